# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation: who is ranked against whom, what counts as found, and that nothing fails in silence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.errors import EmbedderError
from recipes.tiny_digits import evaluate as module
from recipes.tiny_digits.canvas import HELD_OUT_SCANS
from recipes.tiny_digits.contrastive import embed_input, load_embedder
from recipes.tiny_digits.evaluate import main, quality_of, score_view, true_tcots
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import Sample, make_samples, write_world

SWAPPED = torch.eye(4)[[1, 0, 3, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return load_embedder(folder)


def samples_of(*sources: str, count: int = 4) -> list[Sample]:
    return [s for source in sources for s in make_samples(source, count, scans=HELD_OUT_SCANS, seed=5)]


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`stands_in(query, target)`: these vectors in place of the Embedder's."""

    def install(query: torch.Tensor, target: torch.Tensor) -> None:
        sides = iter([query, target])
        monkeypatch.setattr(module, "embed_rows", lambda _, inputs: (next(sides), []))

    return install


def test_a_query_meets_the_targets_of_its_own_source_only(embedder: Embedder, stands_in: Callable[..., None]) -> None:
    own, other = torch.eye(4), torch.eye(4)[[1, 2, 3, 0]]
    # Every query of the second source points at a target of the first one, too, and as much as at its own.
    stands_in(torch.cat([own, 2 * other + 0.1]), torch.cat([own, other]))
    hit1 = score_view(embedder, samples_of("digits_i2t", "digits_t2i"))["hit1"]
    assert hit1 == {"digits_i2t": 1.0, "digits_t2i": 1.0, "all": 1.0}


def test_all_is_the_plain_mean_over_sources_and_ties_are_misses(embedder, stands_in):
    vectors = torch.cat([torch.eye(8)[:4], torch.ones(8, 8)])
    stands_in(vectors, vectors)
    view = score_view(embedder, samples_of("digits_i2t") + samples_of("digits_t2i", count=8))
    assert view["hit1"] == {"digits_i2t": 1.0, "digits_t2i": 0.0, "all": 0.5}
    assert view["hits"] == {"digits_i2t": [1] * 4, "digits_t2i": [0] * 8}
    assert 0 < view["ndcg5"]["all"] < 1


@pytest.mark.parametrize("name", ["target_id", "query_id"])
def test_targets_of_an_equal_target_or_query_are_all_relevant(name, embedder, stands_in):
    samples = samples_of("digits_i2t")
    shared = [replace(s, record=replace(s.record, **{name: "same"})) for s in samples[:2]] + samples[2:]
    stands_in(torch.eye(4), SWAPPED)
    assert score_view(embedder, shared)["hits"] == {"digits_i2t": [1, 1, 0, 0]}


def test_true_tcots_are_well_formed_right_and_cut_one_piece_of_evidence_a_box(embedder: Embedder) -> None:
    samples = samples_of("digits_i2t", "digits_video")
    view = score_view(embedder, samples, true_tcots(samples))
    # Of four kinds of sides: one box, two key frames, and nothing to cut from the two texts.
    evidence = (1 + 2 + 0 + 0) / 4
    right = dict.fromkeys(("well_formed", "format", "digits", "written", "exact"), 1.0)
    assert view["failed_rows"] == 0 and view["quality"] == {**right, "evidence": evidence}


def test_broken_tcots_are_embedded_all_the_same_and_counted_as_broken(embedder: Embedder) -> None:
    wrong = ["<thinking>{}</thinking> no"] * 4
    view = score_view(embedder, samples_of("digits_i2i"), {"query": wrong, "target": wrong})
    assert view["failed_rows"] == 0
    assert view["quality"] == dict.fromkeys(("well_formed", "format", "digits", "written", "exact", "evidence"), 0.0)


def test_digits_are_compared_place_by_place() -> None:
    samples = samples_of("digits_page")
    numbers = [s.record.target_id.split()[-1] for s in samples]
    answers = [s.record.target_id.split(":")[1] for s in samples]
    answers[1] = answers[1][:-1] + str((int(answers[1][-1]) + 1) % 10)
    answers[2], answers[3] = answers[2].replace(numbers[2], numbers[2][0]), ""
    texts = [f"<thinking>{{}}</thinking><rethink>ok</rethink><answer>{answer}</answer>" for answer in answers]
    tcots = {"query": texts, "target": true_tcots(samples)["target"]}
    inputs = {
        side: [embed_input(s, side, text, "qwen2_vl") for s, text in zip(samples, tcots[side], strict=True)]
        for side in tcots
    }
    quality = quality_of(samples, tcots, inputs)
    assert quality["digits"] == pytest.approx((4 + 3 + 1 + 0) / 16) and quality["exact"] == pytest.approx(1 / 4)
    assert quality["written"] == pytest.approx(8 / 9), "what was left out is not wrong"


def test_an_input_that_cannot_be_embedded_is_a_counted_miss(embedder, monkeypatch):
    samples = samples_of("digits_i2t")
    encode, first = embedder.processor.encode, embed_input(samples[0], "query", None, "qwen2_vl")

    def refuse_first_query(one: EmbedInput) -> object:
        if one.item.images[:1] == first.item.images[:1]:
            raise EmbedderError("too long")
        return encode(one)

    monkeypatch.setattr(embedder.processor, "encode", refuse_first_query)
    view = score_view(embedder, samples)
    assert view["problems"] == [f"query of {samples[0].record.pair_id}: too long"] and view["failed_rows"] == 1
    assert view["hits"]["digits_i2t"][0] == 0
    monkeypatch.setattr(embedder, "embed_encoded", lambda rows: torch.full((len(rows), embedder.dim), torch.inf))
    assert score_view(embedder, samples)["failed_rows"] == 8


def test_command_writes_every_view_with_counts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path / "world", sft=4, train=4, heldout=4)
    monkeypatch.setattr(module, "THREADS", 1)
    main(folder, tmp_path / "world", folder, folder, tmp_path / "evaluation.json", seed=3)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["views"]) == ["raw", "before", "after", "truth"]
    assert (result["seed"], result["pairs"], set(result["queries"].values())) == (3, 24, {4})
    assert result["views"]["before"] == result["views"]["after"], "the same Reasoner twice must score the same"
    for name, view in result["views"].items():
        assert view["failed_rows"] == 0 and (view["quality"] is None) == (name == "raw")
        assert all(sum(view["hits"][source]) / 4 == view["hit1"][source] for source in result["queries"])
