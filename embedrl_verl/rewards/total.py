# SPDX-License-Identifier: Apache-2.0
"""Total reward: the weighted sum of format, process and outcome, with unknown terms left out (method section 4, eq.
5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedrl_verl.rewards.exact import snap_

# Defaults of the paper (eq. 5, supplement B.2).
ALPHA, BETA, GAMMA = 0.05, 0.8, 0.2


@torch.no_grad()
def total_reward(
    format: Tensor,
    process: Tensor,
    outcome: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    """R_i = alpha * F_i + beta * J_i + gamma * O_i over the known terms.

    Args:
        format, process, outcome: (N,) float; NaN = unknown, which adds nothing.
        alpha, beta, gamma: weights, at least 0. A term of weight 0 is no part of the reward, known or not.

    Returns:
        (N,) of the terms' common dtype; NaN where every term with a weight is unknown.

    Raises:
        ValueError: shapes differ, or a weight is negative or not finite.
    """
    if not format.shape == process.shape == outcome.shape:
        raise ValueError(
            "format, process and outcome must have one shape; got "
            f"{tuple(format.shape)}, {tuple(process.shape)}, {tuple(outcome.shape)}"
        )
    total = torch.zeros(format.shape, dtype=torch.float64, device=outcome.device)
    known = torch.zeros(format.shape, dtype=torch.bool, device=outcome.device)
    for name, weight, term in (("alpha", alpha, format), ("beta", beta, process), ("gamma", gamma, outcome)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {weight}")
        if weight > 0:
            total += (weight * term.double()).nan_to_num(nan=0.0)
            known |= ~term.isnan()
    dtype = torch.promote_types(torch.promote_types(format.dtype, process.dtype), outcome.dtype)
    return total.masked_fill_(~known, torch.nan).to(dtype)


@torch.no_grad()
def fill_with_group_mean(term: Tensor, group: Tensor) -> Tensor:
    """Give an unknown value the mean of its group's known values, so that it moves no advantage of GRPO.

    A plain sum would turn "unknown" into 0, which for the process term is a miss.

    Args:
        term: (N,) float in [-2, 2], NaN = unknown.
        group: (N,) int, rows of one prompt share an id.

    Returns:
        (N,) of the same dtype; NaN only where the whole group is unknown.
    """
    ids = torch.unique(group, return_inverse=True)[1]
    known = ~term.isnan()
    values = snap_(term[known].to(torch.float64, copy=True), 4 * term.numel())
    size = int(ids.max()) + 1 if ids.numel() else 0
    total = torch.zeros(size, dtype=torch.float64, device=term.device).index_add_(0, ids[known], values)
    mean = total / torch.bincount(ids[known], minlength=size)  # 0 / 0: NaN
    return torch.where(known, term, mean[ids].to(term.dtype))
