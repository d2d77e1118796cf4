# SPDX-License-Identifier: Apache-2.0
"""Mistakes that would show minutes after the start are looked for before it: the reward function and the Embedder."""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.reward import get_custom_reward_fn

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.loading import check_profile, load_config
from embedrl_verl.embedder.profiles import resolve_profile
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.reward_manager import EmbedderGuidedRewardManager

PROBE = '<thinking>{"text_keywords": ["probe"]}</thinking><rethink>ok</rethink><answer>probe</answer>'


def probe_batch(*, pairs: int = 2, rollouts: int = 2) -> RewardBatch:
    """A small batch of `pairs` x 2 sides x `rollouts` rows with well-formed T-CoTs, to try a reward function on."""
    rows = [(pair, side, g) for pair in range(pairs) for side in (0, 1) for g in range(rollouts)]
    pair, side, rollout = (torch.tensor(values) for values in zip(*rows, strict=True))
    vectors = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(0))
    return RewardBatch.build(
        side=side,
        pair=pair,
        rollout=rollout,
        content=pair,
        tcots=[parse_tcot(PROBE)] * len(rows),
        required=["text_keywords"] * len(rows),
        embeddings=torch.nn.functional.normalize(vectors, dim=1),
    )


def check_reward_function(config: Any) -> None:
    """Load the reward function as verl will and call it on `probe_batch`.

    Raises:
        ConfigError: what the function says of its arguments (an unknown key, a judge that is not there), or a result
            that is not one score a row.
    """
    manager = EmbedderGuidedRewardManager(config, tokenizer=None, compute_score=get_custom_reward_fn(config))
    manager.score_batch(probe_batch())


def check_embedder(config: EmbedderConfig) -> None:
    """Read the Embedder's configuration and tokenizer, not its weights.

    Raises:
        EmbedderError: no such checkpoint, or one that does not fit the profile (its token is missing, another family).
    """
    assert config.path is not None  # EmbedderConfig refuses a missing path
    check_profile(config.path, load_config(config.path), resolve_profile(config.path, config.profile))
