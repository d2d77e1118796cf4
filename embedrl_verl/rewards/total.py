# SPDX-License-Identifier: Apache-2.0
"""Total reward: the weighted sum of format, process and outcome, with unknown terms left out (method section 4, eq.
5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
def partly_known(term: Tensor, group: Tensor) -> Tensor:
    """(N,) bool: the term is unknown here and known of another row of the group.

    Such a row cannot be compared with the others of its group: with the term left out, or filled with their mean, it
    would move their advantages.

    Args:
        term: (N,) float, NaN = unknown.
        group: (N,) int, rows of one prompt share an id.
    """
    known = ~term.isnan()
    return ~known & torch.isin(group, group[known])
