# SPDX-License-Identifier: Apache-2.0
"""The contrastive stage moves the Embedder, and corruption touches answers only."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedrl_verl.embedder import Embedder
from embedrl_verl.errors import ConfigError
from recipes.tiny_digits.contrastive import ContrastiveConfig, corrupt, embed_input, train_contrastive
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.reasoner import tiny_limits
from recipes.tiny_digits.world import SFT_SCANS, make_samples


def test_corruption_changes_digits_of_the_answer_alone() -> None:
    tcot = '<thinking>{"bbox_2d":[0,250,1000,500]}</thinking><rethink>ok</rethink><answer>parcel 3071</answer>'
    assert corrupt(tcot, 0.0, np.random.default_rng(0)) == tcot
    wrong = corrupt(tcot, 1.0, np.random.default_rng(0))
    assert wrong != tcot and wrong.split("<answer>")[0] == tcot.split("<answer>")[0]
    assert wrong.startswith(tcot[: tcot.index("3071")]) and len(wrong) == len(tcot)


def test_training_brings_partners_together(tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained(build_tiny_model(tmp_path), limits=tiny_limits("qwen2_vl"))
    samples = make_samples("digits_i2t", 4, scans=SFT_SCANS, seed=1)

    def margin() -> float:
        query = embedder.embed([embed_input(s, "query", s.query.tcot, "qwen2_vl") for s in samples])
        target = embedder.embed([embed_input(s, "target", s.target.tcot, "qwen2_vl") for s in samples])
        similarity = query @ target.T
        others = similarity[~torch.eye(len(samples), dtype=torch.bool)]
        return float(similarity.diagonal().mean() - others.mean())

    before = margin()
    train_contrastive(
        embedder, samples, ContrastiveConfig(steps=40, families=1, warmup=3, raw_share=0.0, terse_share=0.0)
    )
    assert margin() > before + 0.05


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\]"):
        ContrastiveConfig(raw_share=1.5)
    with pytest.raises(ConfigError, match="must be positive"):
        ContrastiveConfig(temperature=0.0)
