# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation: who is ranked against whom, what counts as found, and that nothing fails in silence."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.errors import DataError, EmbedderError
from recipes.tiny_digits import evaluate as module
from recipes.tiny_digits.canvas import HELD_OUT_SCANS
from recipes.tiny_digits.evaluate import evaluate, main, score_view, true_tcots
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.reasoner import tiny_limits
from recipes.tiny_digits.world import Sample, make_samples, write_world

WRONG = "<thinking>{}</thinking> no"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, limits=tiny_limits("qwen2_vl"))


def samples_of(*sources: str, count: int = 4) -> list[Sample]:
    return [s for source in sources for s in make_samples(source, count, scans=HELD_OUT_SCANS, seed=5)]


def vectors_by_item(samples: Sequence[Sample], vectors: dict[str, list[list[float]]]) -> object:
    """Stands in for `embed_rows`: the vectors of one side after the other, in the order of the calls."""
    sides = iter([torch.tensor(vectors["query"]), torch.tensor(vectors["target"])])

    def embed(_: Embedder, inputs: Sequence[EmbedInput]) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        assert len(inputs) == len(samples)
        return next(sides), []

    return embed


def test_a_query_meets_the_targets_of_its_own_source_only(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of("digits_i2t", "digits_t2i")
    # Every query of the second source points at the target of the first one's same place, far more than at its own.
    own = torch.eye(4).tolist()
    query = own + (2 * torch.eye(4) + 0.1).tolist()
    monkeypatch.setattr(module, "embed_rows", vectors_by_item(samples, {"query": query, "target": own + own}))
    assert score_view(embedder, samples).hit1 == {"digits_i2t": 1.0, "digits_t2i": 1.0, "all": 1.0}


def test_all_is_the_plain_mean_over_sources_and_ties_are_misses(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_of("digits_i2t") + samples_of("digits_t2i", count=8)
    query = torch.eye(8)[:4].tolist() + torch.ones(8, 8).tolist()
    target = torch.eye(8)[:4].tolist() + torch.ones(8, 8).tolist()
    monkeypatch.setattr(module, "embed_rows", vectors_by_item(samples, {"query": query, "target": target}))
    view = score_view(embedder, samples)
    assert view.hit1 == {"digits_i2t": 1.0, "digits_t2i": 0.0, "all": 0.5}
    assert view.hits == {"digits_i2t": [1] * 4, "digits_t2i": [0] * 8}
    assert 0 < view.ndcg5["all"] < 1


def test_targets_of_the_same_content_are_all_relevant(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of("digits_i2t")
    shared = [replace(s, record=replace(s.record, target_id="same")) for s in samples[:2]] + samples[2:]
    swapped = torch.eye(4)[[1, 0, 3, 2]].tolist()
    vectors = {"query": torch.eye(4).tolist(), "target": swapped}
    monkeypatch.setattr(module, "embed_rows", vectors_by_item(shared, vectors))
    assert score_view(embedder, shared).hits == {"digits_i2t": [1, 1, 0, 0]}


def test_true_tcots_are_well_formed_right_and_cut_one_piece_of_evidence_a_box(embedder: Embedder) -> None:
    samples = samples_of("digits_i2t", "digits_video")
    view = score_view(embedder, samples, true_tcots(samples))
    assert view.failed_rows == 0
    quality = view.quality
    assert quality is not None
    assert (quality.well_formed, quality.format, quality.digits, quality.exact) == (1.0, 1.0, 1.0, 1.0)
    # Of four kinds of sides: one box, two key frames, and nothing to cut from the two texts.
    assert quality.evidence == pytest.approx((1 + 2 + 0 + 0) / 4)


def test_broken_tcots_are_embedded_all_the_same_and_counted_as_broken(embedder: Embedder) -> None:
    samples = samples_of("digits_i2i")
    view = score_view(embedder, samples, {"query": [WRONG] * 4, "target": [WRONG] * 4})
    assert view.failed_rows == 0
    assert view.quality is not None
    assert (view.quality.well_formed, view.quality.exact, view.quality.evidence) == (0.0, 0.0, 0.0)


def test_an_input_that_cannot_be_embedded_is_a_counted_miss(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_of("digits_i2t")
    encode = embedder.processor.encode

    def refuse_first_query(one: EmbedInput) -> object:
        if one.item.images and one.item.images[0] == first.item.images[0]:
            raise EmbedderError("too long")
        return encode(one)

    first = module.embed_input(samples[0], "query", None, "qwen2_vl")
    monkeypatch.setattr(embedder.processor, "encode", refuse_first_query)
    view = score_view(embedder, samples)
    assert view.failed_rows == 1
    assert view.problems == (f"query of {samples[0].record.pair_id}: too long",)
    assert view.hits["digits_i2t"][0] == 0


def test_no_pair_is_refused(embedder: Embedder) -> None:
    with pytest.raises(DataError, match="at least one held-out pair; got none"):
        evaluate(embedder, [], {})


def test_command_writes_every_view_with_counts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path / "world", 4, 4, 4)
    argv = ["--world", str(tmp_path / "world"), "--embedder", str(folder), "--out", str(tmp_path / "evaluation.json")]
    monkeypatch.setattr(module, "THREADS", 1)
    main([*argv, "--reasoner-before", str(folder), "--reasoner-after", str(folder), "--seed", "3"])
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["views"]) == ["raw", "before", "after", "truth"]
    assert (result["seed"], result["pairs"], set(result["queries"].values())) == (3, 24, {4})
    assert result["views"]["before"] == result["views"]["after"], "the same Reasoner twice must score the same"
    for name, view in result["views"].items():
        assert view["failed_rows"] == 0
        assert (view["quality"] is None) == (name == "raw")
        assert all(sum(view["hits"][source]) / 4 == view["hit1"][source] for source in result["queries"])


def test_targets_of_an_equal_query_are_all_relevant(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of("digits_i2t")
    shared = [replace(s, record=replace(s.record, query_id="photo")) for s in samples[:2]] + samples[2:]
    vectors = {"query": torch.eye(4).tolist(), "target": torch.eye(4)[[1, 0, 3, 2]].tolist()}
    monkeypatch.setattr(module, "embed_rows", vectors_by_item(shared, vectors))
    assert score_view(embedder, shared).hits == {"digits_i2t": [1, 1, 0, 0]}
