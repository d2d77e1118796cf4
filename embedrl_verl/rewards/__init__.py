# SPDX-License-Identifier: Apache-2.0
"""Rewards as pure functions of tensors: no verl, no Ray, callable from a REPL.

`retrieval` and `total` are the maths; `RewardBatch` holds a step's rollouts for a reward function; `functions` has the
ready-made ones, for verl's key `reward.custom_reward_function`. `contract` loads and calls a function; `dump` keeps a
step's rewards in a file, `trial` computes them again.
"""

from embedrl_verl.rewards.batch import Judge, RewardBatch, Side
from embedrl_verl.rewards.metrics import batch_metrics
from embedrl_verl.rewards.retrieval import (
    Accuracy,
    Direction,
    OutcomeReward,
    Ranks,
    Retrieval,
    outcome_reward,
    similarity_matrix,
)
from embedrl_verl.rewards.total import NO_JUDGE, PAPER, PUBLIC_CODE, RewardConfig, partly_known, total_reward

__all__ = [
    "NO_JUDGE",
    "PAPER",
    "PUBLIC_CODE",
    "Accuracy",
    "Direction",
    "Judge",
    "OutcomeReward",
    "Ranks",
    "Retrieval",
    "RewardBatch",
    "RewardConfig",
    "Side",
    "batch_metrics",
    "outcome_reward",
    "partly_known",
    "similarity_matrix",
    "total_reward",
]
