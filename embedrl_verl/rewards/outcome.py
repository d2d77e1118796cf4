# SPDX-License-Identifier: Apache-2.0
"""Outcome reward: how well a row's embedding retrieves its pair (method section 4; paper equations 3 and 7).

O_i = A_i * M_i. A_i: are the positives on top? M_i: by how much do they beat the negatives, hard ones counting more?
One direction at a time: query rows over target columns with S, target rows over query columns with S.T. All arithmetic
is float64 and independent of order (see `exact`), so permuting rows or columns permutes the result bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embedrl_verl.rewards.candidates import NO_CANDIDATE, check_direction, find_candidates, iter_negatives
from embedrl_verl.rewards.exact import mean_of_first, snap_

Accuracy = Literal["share", "all"]
ACCURACIES = ("share", "all")


class OutcomeReward(NamedTuple):
    """(R,) each, NaN where unknown. `accuracy` in [0, 1]; `margin` in [-2, 2] for cosines; `outcome` = their
    product.
    """

    accuracy: Tensor
    margin: Tensor
    outcome: Tensor


class Retrieval(NamedTuple):
    """One direction's reward, and per row (R,) what only metrics need.

    `hit`: 1.0 if the best positive is above every negative, else 0.0 (NaN where unknown). `false_negatives`: int64
    number of valid columns of other pairs that share a content with the row's pair, 0 for an invalid row.
    """

    reward: OutcomeReward
    hit: Tensor
    false_negatives: Tensor


def outcome_reward(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    *,
    col_content: Tensor | None = None,
    col_valid: Tensor | None = None,
    row_valid: Tensor | None = None,
    temperature: float = 0.5,
    accuracy: Accuracy = "share",
) -> OutcomeReward:
    """Accuracy, margin and outcome of every row of one direction.

    Args:
        similarity: (R, C) float. NaN marks an unknown candidate: it counts neither as positive nor as negative of that
            row.
        row_pair: (R,) int, pair of each row.
        col_pair: (C,) int, pair of each column.
        col_content: (C, 2) int, ids of the query's and the target's content of each column's pair (`content_id`); or
            (C, K) or (C,) for other kinds of ids. A column of another pair that shares an id with one of the row's own
            columns (valid or not) is a false negative and left out. Without it every other pair is a negative.
        col_valid: (C,) bool, False where the embedding failed: nobody's candidate.
        row_valid: (R,) bool, False where the embedding failed: the row is unknown.
        temperature: tau of the softmax weights of the negatives.
        accuracy: with G valid positives, "share" = the share of the row's top G that are positives; "all" = 1 if all
            are, else 0. A negative that ties with a positive ranks above it.

    Returns:
        (R,) tensors of the dtype of `similarity` (float32 for half precision). NaN for rows that are invalid or have no
        valid positive. Without any negative the margin is the mean of the positives.

    Raises:
        ValueError: shapes, dtypes, temperature or accuracy are wrong, or a valid row's similarities are infinite.
    """
    return retrieval(
        similarity,
        row_pair,
        col_pair,
        col_content=col_content,
        col_valid=col_valid,
        row_valid=row_valid,
        temperature=temperature,
        accuracy=accuracy,
    ).reward


@torch.no_grad()
def retrieval(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    *,
    col_content: Tensor | None = None,
    col_valid: Tensor | None = None,
    row_valid: Tensor | None = None,
    temperature: float = 0.5,
    accuracy: Accuracy = "share",
) -> Retrieval:
    """`outcome_reward` with Hit@1 and the false negatives of every row; same arguments and errors."""
    check_direction(similarity, row_pair, col_pair, col_content, col_valid, row_valid)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if accuracy not in ACCURACIES:
        raise ValueError(f"accuracy must be one of {', '.join(ACCURACIES)}; got {accuracy!r}")
    rows, cols = similarity.shape
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    if rows == 0 or cols == 0:
        unknown = similarity.new_full((rows,), torch.nan, dtype=dtype)
        return Retrieval(OutcomeReward(unknown, unknown, unknown), unknown, torch.zeros_like(row_pair))

    found = find_candidates(similarity, row_pair, col_pair, col_content, col_valid, row_valid)
    positives, count = found.positives, found.count
    top_negatives = torch.full_like(positives, NO_CANDIDATE)
    hard = torch.empty_like(positives[:, 0])
    false_negatives = torch.zeros_like(count)
    for block, scores, scratch in iter_negatives(similarity, found.hidden, col_valid):
        false_negatives[block] = torch.eq(scores, NO_CANDIDATE, out=scratch).sum(dim=1).to(torch.int64)
        width = max(1, int(count[block].max()))
        top = scores.topk(width, dim=1).values
        if top[:, 0].isnan().any():  # NaN sorts first: masking it is paid only where there is one
            scores.masked_fill_(scores.isnan(), NO_CANDIDATE)
            top = scores.topk(width, dim=1).values
        top_negatives[block, :width] = top
        hard[block] = _soft_maximum(scores, top[:, :1], scratch, temperature)

    share = _share_on_top(positives, count, top_negatives)
    acc = share.floor() if accuracy == "all" else share
    margin = mean_of_first(positives, count) - hard
    overflow = ((count > 0) & ~margin.isfinite()).nonzero()
    if len(overflow):
        raise ValueError(
            f"similarities of valid rows and columns must be finite, or NaN for unknown; row {int(overflow[0])} of "
            f"{rows} has an infinite one. Mark failed embeddings in row_valid and col_valid"
        )
    false_negatives -= found.own if col_valid is None else found.own + (~col_valid).sum()
    if row_valid is not None:
        false_negatives *= row_valid
    hit = (positives[:, 0] > top_negatives[:, 0]).to(dtype).masked_fill_(count == 0, torch.nan)
    reward = OutcomeReward(acc.to(dtype), margin.to(dtype), (acc * margin).to(dtype))
    return Retrieval(reward, hit, false_negatives)


def _share_on_top(positives: Tensor, count: Tensor, top_negatives: Tensor) -> Tensor:
    """(R,) float64 share of a row's top G that are positives, with G = `count` (R,); NaN for G = 0.

    `positives` and `top_negatives` (R, P) fall along a row. The m-th best positive (from 0) is among the top G if fewer
    than G - m negatives reach it, so it is compared with the (G - m)-th best negative.
    """
    place = torch.arange(positives.shape[1], device=count.device)
    rival = (count[:, None] - 1 - place).clamp_(min=0)
    on_top = (positives > top_negatives.gather(1, rival)) & (place < count[:, None])
    return on_top.sum(dim=1) / count.double()


def _soft_maximum(scores: Tensor, peak: Tensor, scratch: Tensor, temperature: float) -> Tensor:
    """(r,) float64: sum over j of softmax(S_j / tau) * S_j (eq. 7), 0 for a row without candidates.

    Args:
        scores: (r, C) float64, `NO_CANDIDATE` = none; overwritten.
        peak: (r, 1) their maximum.
        scratch: (r, C) float64; overwritten.
    """
    # In units of tau below the peak, weights are in [0, 1] and weight * exponent in [-1/e, 0]: both fit the grid.
    exponent = scores.sub_(peak).mul_(1.0 / temperature)
    weight = torch.exp(exponent, out=scratch)
    snap_(exponent.mul_(weight), scores.shape[1])
    snap_(weight, scores.shape[1])
    mean = exponent.sum(dim=1) / weight.sum(dim=1)
    return (peak[:, 0] + temperature * mean).masked_fill(peak[:, 0] == NO_CANDIDATE, 0.0)
