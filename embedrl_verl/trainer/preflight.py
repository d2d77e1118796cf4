# SPDX-License-Identifier: Apache-2.0
"""Mistakes that would show minutes after the start are looked for before it: the reward function and the Embedder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.reward import get_custom_reward_fn

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.profiles import fitting_profile
from embedrl_verl.embedder.sentence import check_sentence_model, has_profile
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.contract import load_reward_function
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.reward_manager import EmbedderGuidedRewardManager

PROBE = '<thinking>{"text_keywords": ["probe"]}</thinking><rethink>ok</rethink><answer>probe</answer>'


def probe_batch(*, pairs: int = 2, rollouts: int = 2, judge: bool = False, raw: bool = False) -> RewardBatch:
    """A small batch of `pairs` x 2 sides x `rollouts` rows with well-formed T-CoTs, to try a reward function on.

    Args:
        judge: it has a judge, which picks right in every other row and does not know the first one.
        raw: the raw inputs are embedded.
    """
    rows = [(pair, side, g) for pair in range(pairs) for side in (0, 1) for g in range(rollouts)]
    pair, side, rollout = (torch.tensor(values) for values in zip(*rows, strict=True))
    vectors = torch.nn.functional.normalize(
        torch.randn(2, len(rows), 8, generator=torch.Generator().manual_seed(0)), dim=2
    )
    return RewardBatch.build(
        side=side,
        pair=pair,
        rollout=rollout,
        content=pair,
        tcots=[parse_tcot(PROBE)] * len(rows),
        required=["text_keywords"] * len(rows),
        embeddings=vectors[0],
        lengths=20 + rollout,
        raw_embeddings=vectors[1, 2 * pair + side] if raw else None,
        judge=_probe_judge if judge else None,
    )


async def _probe_judge(batch: RewardBatch) -> Tensor:
    picks = (torch.arange(len(batch)) % 2).float()
    picks[0] = torch.nan
    return picks


def check_reward_function(config: Any, *, judge: bool = False, raw: bool = False) -> None:
    """Load the reward function as verl will and call it on `probe_batch`.

    Args:
        judge, raw: whether the run has a judge, and whether it embeds the raw inputs.

    Raises:
        ConfigError: the function cannot be loaded, what it says of its arguments (an unknown key, a judge that is not
            there), an error that it raises, or a result that is not one score a row.
    """
    named = config.reward.custom_reward_function
    if named.path:
        load_reward_function(f"{named.path}:{named.name}")  # verl's own loader says less of what is wrong
    manager = EmbedderGuidedRewardManager(config, tokenizer=None, compute_score=get_custom_reward_fn(config))
    manager.score_batch(probe_batch(judge=judge, raw=raw))


def check_embedder(config: EmbedderConfig) -> None:
    """Read the Embedder's configuration and tokenizer, not its weights.

    Raises:
        EmbedderError: no such checkpoint, or one that does not fit the profile (its token is missing, another family).
        ConfigError: not a sentence-transformers model, where one is asked for.
    """
    assert config.path is not None  # EmbedderConfig refuses a missing path
    if config.backend == "sentence_transformers":
        check_sentence_model(config.path)
        if not has_profile(config):
            return
    fitting_profile(config.path, config.profile)
