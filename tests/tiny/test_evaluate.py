# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation of a tiny run: the digits that T-CoTs name, and every view with its counts."""

import json
from pathlib import Path

import pytest

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.evaluation.retrieval import Pairs, score_view
from embedrl_verl.model import Written
from embedrl_verl.model.embedders import LocalEmbedder
from recipes.tiny_digits import evaluate as module
from recipes.tiny_digits.canvas import HELD_OUT_SCANS
from recipes.tiny_digits.contrastive import load_embedder
from recipes.tiny_digits.evaluate import digits_right, main, true_tcots
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import SOURCES, Sample, make_samples, write_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), seed=1)


def samples_of(*sources: str) -> list[Sample]:
    return [s for source in sources for s in make_samples(source, 4, scans=HELD_OUT_SCANS, seed=5)]


@pytest.mark.parametrize("broken", [False, True])
def test_true_tcots_are_well_formed_right_and_cut_one_piece_of_evidence_a_box(folder, broken):
    samples = samples_of("digits_i2t", "digits_video")
    wrong = [Written("<thinking>{}</thinking> no")] * len(samples)
    tcots = {"query": wrong, "target": wrong} if broken else true_tcots(samples)
    pairs = Pairs([sample.record for sample in samples], [None] * len(samples))
    view = score_view(LocalEmbedder(load_embedder(folder)), pairs, tcots, "qwen2_vl", EvidenceConfig())
    # Of four kinds of sides: one box, two key frames, and nothing to cut from the two texts.
    shares, evidence = (0.0, 0.0) if broken else (1.0, (1 + 2 + 0 + 0) / 4)
    assert view["failed_rows"] == 0
    assert view["quality"] == {"well_formed": shares, "format": shares, "evidence": evidence}
    assert digits_right(samples, tcots) == dict.fromkeys(("digits", "written", "exact"), shares)


def test_digits_are_compared_place_by_place() -> None:
    samples = samples_of("digits_page")
    numbers = [s.record.target_id.split()[-1] for s in samples]
    answers = [s.record.target_id.split(":")[1] for s in samples]
    answers[1] = answers[1][:-1] + str((int(answers[1][-1]) + 1) % 10)
    answers[2], answers[3] = answers[2].replace(numbers[2], numbers[2][0]), ""
    texts = [f"<thinking>{{}}</thinking><rethink>ok</rethink><answer>{answer}</answer>" for answer in answers]
    right = digits_right(samples, {**true_tcots(samples), "query": [Written(text) for text in texts]})
    assert right["digits"] == pytest.approx((4 + 3 + 1 + 0) / 16) and right["exact"] == pytest.approx(1 / 4)
    assert right["written"] == pytest.approx(8 / 9), "what was left out is not wrong"


def test_command_writes_every_view_with_counts_and_every_tcot(folder, tmp_path, monkeypatch):
    write_world(tmp_path / "world", sft=4, train=4, heldout=4)
    monkeypatch.setattr(module, "THREADS", 1)
    main(folder, tmp_path, folder, folder, [str(tmp_path / "world" / "heldout.parquet")], seed=3)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["views"]) == ["raw", "before", "after", "truth"]
    assert (result["seed"], result["pairs"], set(result["queries"].values())) == (3, 4 * len(SOURCES), {4})
    assert result["views"]["before"] == result["views"]["after"], "the same Reasoner twice must score the same"
    for name, view in result["views"].items():
        assert view["failed_rows"] == 0 and (view["quality"] is None) == (name == "raw")
        assert all(sum(view["hits"][source]) / 4 == view["hit1"][source] for source in result["queries"])
    lines = [json.loads(line) for line in (tmp_path / "tcots.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 4 * len(SOURCES) * 2 and {line["view"] for line in lines} == {"before", "after", "truth"}
