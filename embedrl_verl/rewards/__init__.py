# SPDX-License-Identifier: Apache-2.0
"""Rewards as pure functions of tensors: no verl, no Ray, callable from a REPL.

`outcome_reward` and `total_reward` are the maths; `RewardBatch` holds a step's rollouts for a reward function;
`functions` has the ready-made ones, for verl's key `reward.custom_reward_function`, and `presets` their weights.
"""

from embedrl_verl.rewards.batch import Direction, Judge, RewardBatch, Side
from embedrl_verl.rewards.exact import similarity_matrix
from embedrl_verl.rewards.metrics import batch_metrics
from embedrl_verl.rewards.outcome import Accuracy, OutcomeReward, Retrieval, outcome_reward
from embedrl_verl.rewards.presets import NO_JUDGE, PAPER, PUBLIC_CODE, RewardConfig
from embedrl_verl.rewards.total import fill_with_group_mean, total_reward

__all__ = [
    "NO_JUDGE",
    "PAPER",
    "PUBLIC_CODE",
    "Accuracy",
    "Direction",
    "Judge",
    "OutcomeReward",
    "Retrieval",
    "RewardBatch",
    "RewardConfig",
    "Side",
    "batch_metrics",
    "fill_with_group_mean",
    "outcome_reward",
    "similarity_matrix",
    "total_reward",
]
