# SPDX-License-Identifier: Apache-2.0
"""What GRPO makes of scores: each row against the others of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

# verl's guard against a division by zero.
_EPSILON = 1e-6


@torch.no_grad()
def grpo_advantages(score: Tensor, group: Tensor, *, norm_by_std: bool = True) -> Tensor:
    """(score - mean of its group) / standard deviation of its group, as verl's `grpo` with `norm_adv_by_std_in_grpo`.

    Args:
        score: (N,) float, NaN = unknown: in training such a row is in no group and has no gradient.
        group: (N,) int, rows of one prompt share an id.
        norm_by_std: False: without the division (Dr. GRPO).

    Returns:
        (N,) float64, NaN where the score is unknown or the only known one of its group, which has nothing to be
        compared with: training leaves such a row out too (verl alone would give it its score as advantage).
    """
    score = score.double()
    known = ~score.isnan()
    ids: Tensor = torch.unique(group, return_inverse=True)[1]
    size = torch.zeros(int(ids.max()) + 1 if ids.numel() else 0, dtype=torch.float64, device=score.device)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(size).index_add_(0, ids[known], values[known])

    size = total(torch.ones_like(score))
    mean = total(score) / size
    std = (total((score - mean[ids]) ** 2) / (size - 1)).sqrt()
    advantage = score - mean[ids]
    if norm_by_std:
        advantage = advantage / (std[ids] + _EPSILON)
    return advantage.masked_fill(~known | (size[ids] < 2), torch.nan)
