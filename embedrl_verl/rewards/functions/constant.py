# SPDX-License-Identifier: Apache-2.0
"""R = value: plain GRPO without a signal, the baseline of benchmarks (timing only).

reward.custom_reward_function.path=reward/constant.py
'+reward.custom_reward_function.reward_kwargs={value: 0.0}'
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from embedrl_verl.rewards import RewardBatch


def compute_score(batch: RewardBatch, *, value: float = 0.0) -> Mapping[str, Tensor]:
    """{"score": (N,) float32, all `value`}. It computes nothing else, also for rows whose embedding failed."""
    return {"score": torch.full((len(batch),), float(value))}
