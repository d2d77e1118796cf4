# SPDX-License-Identifier: Apache-2.0
"""The contrastive stage moves the Embedder."""

from pathlib import Path

import torch

from recipes.tiny_digits.canvas import TRAIN_SCANS
from recipes.tiny_digits.contrastive import embed_input, load_embedder, train_contrastive
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import make_samples


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
