# SPDX-License-Identifier: Apache-2.0
"""The rank of a query's first relevant candidate, as metrics and the gate count it: ties against the model."""

from __future__ import annotations

import torch
from torch import Tensor


def first_rank(scores: Tensor, relevant: Tensor) -> Tensor:
    """(Q,) int64, the rank of each query's first relevant candidate, from 1 and behind all others of its score; 0 where
    none is retrieved.

    Args:
        scores: (Q, C) float, higher is better, NaN = not retrieved.
        relevant: (Q, C) bool or grades; above 0 = relevant.
    """
    wanted = relevant > 0
    best = scores.masked_fill(~wanted | scores.isnan(), -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~wanted & (scores >= best)).sum(dim=1)  # NaN is not
    return (1 + ahead).masked_fill(best[:, 0] == -torch.inf, 0)
