# SPDX-License-Identifier: Apache-2.0
"""InfoNCE: the contrastive loss that Embedders are trained with (method section 5).

Every row has one or more partners on the other side (same pair); the rows of other pairs are its negatives, except
those of pairs with the same target or the same query: pushing those away would teach that an answer is wrong because it
was drawn twice, or because the question has another one too. `info_nce` is the plain case, row i beside row i;
`contrastive_loss` takes any layout: several rollouts of a pair, hard negatives, Matryoshka dimensions.

Shapes: Q query rows, T target rows, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from embedrl_verl.data.identity import shares_content
from embedrl_verl.errors import EmbedderError

HARD_NEGATIVE = -1
"""`target_pair` of a row that is nobody's partner."""


@dataclass(frozen=True, eq=False)
class ContrastiveLayout:
    """Which rows belong together.

    Attributes:
        query_pair: int64 (Q,), pair of each query row, 0 or more.
        target_pair: int64 (T,), pair of each target row; `HARD_NEGATIVE` for hard negatives, which are negatives of
            every query and take no part in the direction from target to query.
        query_content: int64 (Q, 2), contents of the row's pair (`ContentId`: query, target); or (Q,), the target alone.
        target_content: int64 (T, 2) or (T,), the same of the target rows; a hard negative has `NO_QUERY` and its own
            content.
    """

    query_pair: torch.Tensor
    target_pair: torch.Tensor
    query_content: torch.Tensor
    target_content: torch.Tensor

    def __post_init__(self) -> None:
        kinds = self.query_content.shape[1:]  # (2,) or ()
        for side in ("query", "target"):
            pair, content = getattr(self, f"{side}_pair"), getattr(self, f"{side}_content")
            one_length = pair.dim() == 1 and len(kinds) <= 1 and content.shape == (*pair.shape, *kinds)
            if not one_length or {pair.dtype, content.dtype} != {torch.int64}:
                raise EmbedderError(
                    f"{side}_pair and {side}_content must be int64 of one length; got {pair.dtype} "
                    f"{tuple(pair.shape)} and {content.dtype} {tuple(content.shape)}"
                )
        if (self.query_pair < 0).any():
            raise EmbedderError(f"query_pair must be 0 or more; got {int(self.query_pair.min())}")

    def positives(self) -> torch.Tensor:
        """bool (Q, T): same pair."""
        return self.query_pair[:, None] == self.target_pair[None, :]

    def negatives(self) -> torch.Tensor:
        """bool (Q, T): another pair, of another query and another target.

        A hard negative that shows some pair's target is none of the queries that this target is right for.
        """
        right = self.positives() | shares_content(self.query_content, self.target_content)
        hard = self.target_pair == HARD_NEGATIVE
        if hard.any():
            shown = self.target_content if self.target_content.dim() == 1 else self.target_content[:, -1]
            same = shown[~hard, None] == shown[None, hard]
            right[:, hard] |= right[:, ~hard].float() @ same.float() > 0
        return ~right

    def select(self, queries: torch.Tensor, targets: torch.Tensor) -> ContrastiveLayout:
        """The layout of some rows: bool masks (Q,) and (T,)."""
        return ContrastiveLayout(
            self.query_pair[queries],
            self.target_pair[targets],
            self.query_content[queries],
            self.target_content[targets],
        )

    def to(self, device: torch.device | str) -> ContrastiveLayout:
        """On another device."""
        return ContrastiveLayout(*(getattr(self, field.name).to(device) for field in fields(self)))


class Contrast(NamedTuple):
    """A loss and what it was made of."""

    loss: torch.Tensor  # scalar, differentiable
    hit1: float  # fraction of the queries with negatives that rank a partner strictly above all; NaN without any
    negatives: float  # negatives of a query, mean
    masked: int  # pairs of rows that are no negatives because their query or target is the same


def contrastive_loss(
    query: torch.Tensor,
    target: torch.Tensor,
    layout: ContrastiveLayout,
    *,
    temperature: float = 0.02,
    symmetric: bool = True,
    matryoshka_dims: Sequence[int] = (),
) -> Contrast:
    """Mean over rows of the cross-entropy of finding a partner among the negatives.

    With several partners a row's loss is the mean over them, and partners are not each other's negatives. A row without
    negatives has loss 0; one without partners does not count.

    Args:
        query, target: (Q, D) and (T, D), length 1, float; the maths is float32 at least.
        temperature: of the softmax over cosines; positive.
        symmetric: average over both directions; else only query to target.
        matryoshka_dims: the loss is also taken over the first d numbers of the vectors (scaled to length 1 again) for
            each d, and averaged. D itself is always in.
    """
    rows = (len(layout.query_pair), len(layout.target_pair))
    if query.dim() != 2 or target.dim() != 2 or (len(query), len(target)) != rows or query.shape[1] != target.shape[1]:
        raise EmbedderError(
            f"query and target must be ({rows[0]}, D) and ({rows[1]}, D); "
            f"got {tuple(query.shape)} and {tuple(target.shape)}"
        )
    if not temperature > 0:
        raise EmbedderError(f"temperature must be positive; got {temperature}")
    width = query.shape[1]
    if any(not 1 <= dim <= width for dim in matryoshka_dims):
        raise EmbedderError(f"matryoshka_dims must lie in 1..{width}; got {list(matryoshka_dims)}")
    layout = layout.to(query.device)
    positives, negatives = layout.positives(), layout.negatives()
    if not positives.any():
        raise EmbedderError(f"no query has a partner: the {rows[0]} queries and {rows[1]} targets share no pair")
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, target = query.to(dtype), target.to(dtype)
    losses = []
    for dim in sorted({*matryoshka_dims, width}):  # the whole vectors come last
        q, t = query, target
        if dim < width:
            q, t = F.normalize(query[:, :dim], dim=1), F.normalize(target[:, :dim], dim=1)
        logits = q @ t.T / temperature
        loss = _one_way(logits, positives, negatives)
        if symmetric:
            loss = (loss + _one_way(logits.T, positives.T, negatives.T)) / 2
        losses.append(loss)
    return Contrast(
        torch.stack(losses).mean(),
        _hit1(logits.detach(), positives, negatives),
        float(negatives.sum(dim=1).float().mean()),
        int((~positives & ~negatives).sum()),
    )


def _one_way(logits: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Mean loss of the rows of `logits` that have a positive column."""
    among = logits.masked_fill(~negatives, float("-inf")).logsumexp(dim=1, keepdim=True)
    # -log softmax of one positive among itself and the negatives; exactly 0 where there are no negatives.
    each = torch.logaddexp(logits, among) - logits
    count = positives.sum(dim=1)
    per_row = each.masked_fill(~positives, 0.0).sum(dim=1) / count.clamp(min=1)
    return per_row[count > 0].mean()


def _hit1(logits: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> float:
    best = logits.masked_fill(~positives, float("-inf")).amax(dim=1)
    rival = logits.masked_fill(~negatives, float("-inf")).amax(dim=1)
    asked = positives.any(dim=1) & negatives.any(dim=1)  # to be the best of nothing is no hit
    return float((best > rival)[asked].float().mean())  # NaN of nothing


def info_nce(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 0.02,
    target_content: torch.Tensor | None = None,
    query_content: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """Mean cross-entropy of finding the own partner among the batch; row i matches row i. A scalar, 0 at best.

    Args:
        query, target: (N, D) vectors of length 1, float.
        temperature: of the softmax over cosines; positive.
        target_content, query_content: (N,) int64; equal numbers mark pairs with the same target, or the same query,
            which are never each other's negatives. Default: all differ.
        symmetric: average over both directions; else only query to target.
    """
    if query.shape != target.shape or query.dim() != 2 or not len(query):
        raise EmbedderError(
            "query and target must be (N, D) of the same shape, N >= 1; "
            f"got {tuple(query.shape)} and {tuple(target.shape)}"
        )
    pair = torch.arange(len(query))
    contents = []
    for name, given in (("query_content", query_content), ("target_content", target_content)):
        contents.append(pair if given is None else given.cpu())
        if contents[-1].shape != pair.shape:
            raise EmbedderError(f"{name} must be ({len(query)},); got {tuple(contents[-1].shape)}")
    content = torch.stack(contents, dim=1)
    layout = ContrastiveLayout(pair, pair, content, content)
    return contrastive_loss(query, target, layout, temperature=temperature, symmetric=symmetric).loss
