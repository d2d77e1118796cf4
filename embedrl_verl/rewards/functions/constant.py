# SPDX-License-Identifier: Apache-2.0
"""The same score for every row: no learning signal, for timing EG-RL against plain GRPO on the same rollouts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch


def compute_score(batch: RewardBatch, *, value: float = 0.0) -> Mapping[str, Tensor]:
    """{"score": (N,) float32, all `value`}. It computes nothing else, also for rows whose embedding failed."""
    return {"score": torch.full((len(batch),), float(value))}
