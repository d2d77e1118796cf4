# SPDX-License-Identifier: Apache-2.0
"""The contrastive stage moves the Embedder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import DataError
from recipes.tiny_digits import contrastive
from recipes.tiny_digits.canvas import TRAIN_SCANS
from recipes.tiny_digits.contrastive import embed_input, load_embedder, train_contrastive
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import Sample, make_samples, own_samples


def test_training_brings_partners_together(tmp_path: Path) -> None:
    embedder = load_embedder(build_tiny_model(tmp_path))
    samples = make_samples("digits_i2t", 4, scans=TRAIN_SCANS, seed=1)

    def margin() -> float:
        query = embedder.embed([embed_input(s, "query", s.query.tcot, "qwen2_vl") for s in samples])
        target = embedder.embed([embed_input(s, "target", s.target.tcot, "qwen2_vl") for s in samples])
        similarity = query @ target.T
        others = similarity[~torch.eye(len(samples), dtype=torch.bool)]
        return float(similarity.diagonal().mean() - others.mean())

    before = margin()
    train_contrastive(embedder, samples, steps=60, families=1, raw_share=0.0)
    assert margin() > before + 0.05


def test_own_pairs_are_trained_on_with_their_media_root_and_tcots_and_one_pair_alone_is_refused(tmp_path, monkeypatch):
    embedder = load_embedder(build_tiny_model(tmp_path))
    digits = make_samples("digits_i2t", 4, scans=TRAIN_SCANS, seed=1)
    (tmp_path / "own.png").write_bytes(digits[0].record.query.images[0])
    tcot = digits[0].query.tcot
    own = [
        PairRecord(f"p{i}", source, "Find it.", Item(images=("own.png",), tcot=tcot), Item(f"t{i}", tcot=tcot), "")
        for i, source in enumerate(["with", "with", "without", "without", "alone"])
    ]
    own[2] = replace(own[2], target=Item("t2"))
    write_pairs(own, tmp_path / "own.parquet")
    seen: list[tuple[str, bool]] = []

    def see(_: object, batch: list[Sample], *, with_tcot: bool, parts: str) -> torch.Tensor:
        seen.append((batch[0].record.data_source, with_tcot))
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(contrastive, "batch_loss", see)
    samples = own_samples([str(tmp_path / "own.parquet")], str(tmp_path))
    train_contrastive(embedder, digits, steps=200, families=1, own=samples)
    assert {source for source, _ in seen} == {"digits_i2t", "with", "without"}
    assert ("with", True) in seen and ("without", True) not in seen and ("without", False) in seen
    assert 60 < sum(source == "digits_i2t" for source, _ in seen) < 140
    with pytest.raises(DataError, match="two pairs or more"):
        train_contrastive(embedder, digits, steps=1, own=samples[4:])
    monkeypatch.undo()
    train_contrastive(embedder, digits, steps=4, families=1, own=samples)
