# SPDX-License-Identifier: Apache-2.0
"""What GRPO makes of scores: each row against the others of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from embedrl_verl.rewards.total import fill_with_group_mean

# verl's guard against a division by zero.
_EPSILON = 1e-6


@torch.no_grad()
def grpo_advantages(score: Tensor, group: Tensor, *, norm_by_std: bool = True) -> Tensor:
    """(score - mean of its group) / standard deviation of its group, as verl's `grpo` with `norm_adv_by_std_in_grpo`.

    Args:
        score: (N,) float, NaN = unknown: in training such a row stands in with the mean of its group and has no
            gradient.
        group: (N,) int, rows of one prompt share an id.
        norm_by_std: False: without the division (Dr. GRPO).

    Returns:
        (N,) float64, NaN where the score is unknown. Like verl's, a group of one row has its score as advantage.
    """
    score = score.double()
    filled = fill_with_group_mean(score, group).nan_to_num(nan=0.0)
    ids: Tensor = torch.unique(group, return_inverse=True)[1]
    size = torch.bincount(ids).double()

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(size).index_add_(0, ids, values)

    mean = total(filled) / size
    std = (total((filled - mean[ids]) ** 2) / (size - 1).clamp(min=1)).sqrt()
    mean, std = mean.masked_fill(size == 1, 0.0), std.masked_fill(size == 1, 1.0)
    advantage = filled - mean[ids]
    if norm_by_std:
        advantage = advantage / (std[ids] + _EPSILON)
    return advantage.masked_fill(score.isnan(), torch.nan)
