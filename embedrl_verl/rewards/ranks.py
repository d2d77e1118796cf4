# SPDX-License-Identifier: Apache-2.0
"""Ranks of a row's positives among its negatives, hard or soft: the maths of rewards that pay for places.

One direction at a time, like `outcome`. For positive p of row i, with S the similarity:

    hard: ahead_p = sum over the negatives j of w_j * [S_ij >= S_ip]     a tie counts against the row
    soft: ahead_p = sum over the negatives j of w_j * sigmoid((S_ij - S_ip) / temperature)     smooth, a tie is one half

and the rank is 1 + ahead_p. w_j is 1, or 1 over the number of valid columns of j's pair, so that a pair counts once
whatever it has of columns (`by_pair`). Float64 and independent of order (see `exact`); memory beside S does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embedrl_verl.rewards.candidates import (
    NO_CANDIDATE,
    Candidates,
    check_direction,
    find_candidates,
    iter_negatives,
)
from embedrl_verl.rewards.exact import mean_of_first, snap_

Positives = Literal["mean", "best"]
POSITIVES = ("mean", "best")
# exp of more does not fit into float64.
_LARGEST_EXPONENT = 700.0
# Hard ranks are rounded to this grid, so that three thirds are one and unchanged ranks compare equal.
_RANK_GRID = 2.0**-20


class Ranks(NamedTuple):
    """(R,) each, NaN where unknown; means over the row's positives, or those of its best one.

    `rank`: 1 + ahead, from 1. `reciprocal`: 1 / rank. `beaten`: share of the negatives that are behind, 1 - ahead over
    the negatives' weight.
    """

    rank: Tensor
    reciprocal: Tensor
    beaten: Tensor


@torch.no_grad()
def positive_ranks(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    *,
    col_content: Tensor | None = None,
    col_valid: Tensor | None = None,
    row_valid: Tensor | None = None,
    temperature: float | None = None,
    by_pair: bool = False,
    positives: Positives = "mean",
) -> Ranks:
    """Ranks of every row of one direction.

    Args:
        similarity, row_pair, col_pair, col_content, col_valid, row_valid: as in `outcome_reward`.
        temperature: None for hard ranks, else tau of the soft ones; differences of similarities over it must stay
            within 700 (cosines: 0.003 and more).
        by_pair: a pair's columns count once altogether.
        positives: "mean" of the ranks of all positives, or only the "best" positive (highest similarity).

    Returns:
        Tensors of the dtype of `similarity` (float32 for half precision). NaN for rows that are invalid, or have no
        valid positive, or no negative: there is nothing that they could be ranked against.

    Raises:
        ValueError: shapes, dtypes, temperature or `positives` are wrong, or similarities of valid rows are infinite or
            too far apart for soft ranks.
    """
    check_direction(similarity, row_pair, col_pair, col_content, col_valid, row_valid)
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be None (hard ranks), or positive and finite; got {temperature}")
    if positives not in POSITIVES:
        raise ValueError(f"positives must be one of {', '.join(POSITIVES)}; got {positives!r}")
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    if 0 in similarity.shape:
        unknown = similarity.new_full((similarity.shape[0],), torch.nan, dtype=dtype)
        return Ranks(unknown, unknown, unknown)

    found = find_candidates(similarity, row_pair, col_pair, col_content, col_valid, row_valid)
    count = found.count.clamp(max=1) if positives == "best" else found.count
    _check_positives(found.positives, count, temperature)
    weight = _column_weights(col_pair, col_valid) if by_pair else torch.ones_like(similarity[0], dtype=torch.float64)
    ahead, total = _ahead_of_positives(similarity, found, count, col_valid, weight, temperature)
    if temperature is None:
        ahead, total = ((value / _RANK_GRID).round() * _RANK_GRID for value in (ahead, total))
    count = count.masked_fill(total == 0, 0)
    rank = ahead + 1.0
    parts = (rank, rank.reciprocal(), 1.0 - ahead / total[:, None])
    means = [mean_of_first(part, count) for part in parts]
    wrong = ((count > 0) & ~means[0].isfinite()).nonzero()
    if len(wrong):
        raise ValueError(
            f"similarities of valid rows and columns must be finite, and their differences over the temperature within "
            f"{_LARGEST_EXPONENT:.0f}; row {int(wrong[0])} of {len(rank)} breaks this with temperature={temperature}"
        )
    return Ranks(*(mean.to(dtype) for mean in means))


def _ahead_of_positives(
    similarity: Tensor,
    found: Candidates,
    count: Tensor,
    col_valid: Tensor | None,
    weight: Tensor,
    temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """(R, P) float64 weight of the negatives ahead of each positive (anything beyond a row's `count`), and (R,) float64
    weight of all its negatives."""
    ahead = torch.zeros_like(found.positives)
    total = torch.zeros_like(found.positives[:, 0])
    for block, scores, scratch in iter_negatives(similarity, found.hidden, col_valid):
        own = found.positives[block]
        total[block] = torch.gt(scores, NO_CANDIDATE, out=scratch) @ weight  # False for NaN
        if temperature is None:
            ahead_of = _hard(scores, scratch, weight)
        else:
            ahead_of = _soft(scores, scratch, weight, own, temperature)
        places = torch.arange(own.shape[1], device=own.device) < count[block, None]
        if ((own == own[:, :1]) | ~places).all():  # the same vector for every rollout: one pass for all
            ahead[block] = ahead_of(own[:, :1])[:, None]
            continue
        for place in range(int(count[block].max())):
            ahead[block, place] = ahead_of(own[:, place : place + 1])
    return ahead, total


def _hard(scores: Tensor, scratch: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """For positives (r, 1) the weight (r,) of the negatives that reach them; NaN and no candidates do not."""
    return lambda own: torch.ge(scores, own.clamp(min=-1e100), out=scratch) @ weight


def _soft(
    scores: Tensor, scratch: Tensor, weight: Tensor, own: Tensor, temperature: float
) -> Callable[[Tensor], Tensor]:
    """The same with sigmoids; overwrites `scores` (r, C). `own`: (r, P) positives in falling order, for the scale.

    sigmoid((a - b) / tau) = exp(a / tau) / (exp(a / tau) + exp(b / tau)): one exponential a cell serves all positives.
    """
    if scores.isnan().any():
        scores.masked_fill_(scores.isnan(), NO_CANDIDATE)
    best = own[:, :1].clamp(min=-1e100)
    power = scores.sub_(best).mul_(1.0 / temperature).exp_()

    def ahead_of(positive: Tensor) -> Tensor:
        own_power = (positive - best).mul_(1.0 / temperature).exp_()
        share = torch.div(power, torch.add(power, own_power, out=scratch), out=scratch).mul_(weight)
        return snap_(share, scores.shape[1]).sum(dim=1)

    return ahead_of


def _column_weights(col_pair: Tensor, col_valid: Tensor | None) -> Tensor:
    """(C,) float64: 1 over the number of valid columns of the column's pair, on a grid where sums are exact."""
    pair: Tensor = torch.unique(col_pair, return_inverse=True)[1]
    valid = torch.ones_like(pair) if col_valid is None else col_valid.to(torch.int64)
    size = torch.zeros(int(pair.max()) + 1, dtype=torch.int64, device=pair.device).index_add_(0, pair, valid)
    return snap_(1.0 / size[pair].clamp(min=1).double(), len(pair))


def _check_positives(positives: Tensor, count: Tensor, temperature: float | None) -> None:
    """Soft ranks scale by the best positive: the worst may not be too far from it."""
    if temperature is None:
        return
    last = positives.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    wide = ((count > 0) & ((positives[:, 0] - last) / temperature > _LARGEST_EXPONENT)).nonzero()
    if len(wide):
        raise ValueError(
            f"similarities differ too much for soft ranks of temperature {temperature}: those of row {int(wide[0])}'s "
            f"own pair by {float((positives[:, 0] - last)[wide[0]]):.3g}. Differences over the temperature must stay "
            f"within {_LARGEST_EXPONENT:.0f}"
        )
