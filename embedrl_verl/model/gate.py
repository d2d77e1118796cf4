# SPDX-License-Identifier: Apache-2.0
"""Thinking only where it may help: a query whose two best plain candidates are close."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedrl_verl.ranks import first_rank


@dataclass(frozen=True)
class ThinkGate:
    """A query gets a T-CoT if the margin of its two best plain similarities is below `threshold` (cosines: 0 to 2)."""

    threshold: float

    def thinks(self, similarity: Tensor) -> Tensor:
        """(Q,) bool, of plain similarities (Q, C); also where there are fewer than two candidates or a vector is
        missing (NaN)."""
        return ~(margins(similarity) >= self.threshold)

    @classmethod
    def fit(cls, plain: Tensor, thought: Tensor, relevant: Tensor) -> GateFit:
        """The gate that has the highest Hit@1 on validation queries; of equal ones that which thinks least.

        Args:
            plain, thought: (Q, C) similarities of queries and candidates that are both without, and both with T-CoT.
            relevant: (Q, C) bool.
        """
        margin = margins(plain).nan_to_num(nan=-1.0)
        hits = [(first_rank(one, relevant) == 1).double() for one in (plain, thought)]
        order = margin.argsort()
        # After the n queries of the smallest margins think: their hits with thinking, the others' without.
        gain = torch.cat([torch.zeros(1, dtype=torch.float64), (hits[1] - hits[0])[order].cumsum(0)])
        # Equal margins think together: a threshold cannot part them.
        # Those without a margin always think.
        allowed = torch.cat([(margin[order][:1] >= 0), margin[order][1:] > margin[order][:-1], torch.tensor([True])])
        best = int(gain.masked_fill(~allowed, -torch.inf).argmax())
        top = float(margin.max()) + 1.0
        threshold = float(margin[order][best]) if best < len(order) else top
        return cls(threshold).score(plain, thought, relevant)

    def score(self, plain: Tensor, thought: Tensor, relevant: Tensor) -> GateFit:
        """What this gate does to some queries. Arguments as `fit`."""
        thinks = self.thinks(plain)
        never, always = ((first_rank(one, relevant) == 1).double() for one in (plain, thought))
        shares = (thinks.double(), never, always, torch.where(thinks, always, never))
        return GateFit(self, *(float(one.mean()) for one in shares))


@dataclass(frozen=True)
class GateFit:
    """A gate; `share` of some queries that think, and their Hit@1 with never, always and gated thinking."""

    gate: ThinkGate
    share: float
    never: float
    always: float
    gated: float


def margins(similarity: Tensor) -> Tensor:
    """(Q,) the best similarity less the second best; NaN where there are no two."""
    if similarity.shape[1] < 2:
        return torch.full((len(similarity),), torch.nan)
    top = similarity.nan_to_num(nan=-torch.inf).topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).masked_fill(top.isinf().any(dim=1), torch.nan)
