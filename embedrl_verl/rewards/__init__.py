# SPDX-License-Identifier: Apache-2.0
"""Rewards as pure functions of tensors: no verl, no Ray, callable from a REPL.

`RewardBatch` holds a step's rollouts for a reward function, `retrieval` and `score` are the maths, `functions` has the
ready-made ones. `load` finds a function by name; `dump` keeps a step's rewards in a file, `trial` computes them again.
"""

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.rewards.batch import Judge, RewardBatch, batch_metrics
from embedrl_verl.rewards.retrieval import (
    Accuracy,
    Direction,
    OutcomeReward,
    Positives,
    Ranks,
    Retrieval,
    outcome_reward,
    similarity_matrix,
)
from embedrl_verl.rewards.score import check_number, partly_known, row_scores, total_reward

__all__ = [
    "SIDES",
    "Accuracy",
    "Direction",
    "Judge",
    "OutcomeReward",
    "Positives",
    "Ranks",
    "Retrieval",
    "RewardBatch",
    "Side",
    "batch_metrics",
    "check_number",
    "outcome_reward",
    "partly_known",
    "row_scores",
    "similarity_matrix",
    "total_reward",
]
