# SPDX-License-Identifier: Apache-2.0
"""How well a row's embedding retrieves its own pair: the outcome reward and ranks (paper eq. 3 and 7, method 4).

One direction at a time: query rows over target columns with S, target rows over query columns with S.T.

    Pos(i)  the columns of the row's pair; G of them
    Neg(i)  all others, except false negatives: columns of pairs that show the same query or the same target
    A_i     share of the row's top G that are positives: the accuracy
    M_i     mean over Pos(i) of S_ij - sum over Neg(i) of softmax(S_ij / tau) S_ij, tau = 0.5: the margin
    O_i     A_i M_i: the outcome

Columns without embedding and NaN cells are in neither set. A negative that ties with a positive ranks above it.

Masks are made for a block of rows at a time, so memory is linear in S; arithmetic is float64. Names end in their shape:
R rows (of the block), C columns, P positives of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embedrl_verl.data.identity import shares_content

Accuracy = Literal["share", "all"]
ACCURACIES = ("share", "all")
Positives = Literal["mean", "best"]
POSITIVES = ("mean", "best")

# Stands for "no candidate": below every similarity, and finite, so that a weight of 0 times it is 0.
_NONE = -1e100
# Cells of one block of rows: what is made of it stays in the CPU's cache.
BLOCK_CELLS = 2**18
_PRODUCT_ROWS = 1024
# Hard ranks are rounded to this grid, so that three thirds of a pair are one and unchanged ranks compare equal.
_RANK_GRID = 2.0**-20


@dataclass(frozen=True)
class Direction:
    """Rows of one side over columns of the other.

    `similarity`: (R, C) float cosines, NaN = unknown. `rows` (R,), `cols` (C,): int64 indices into the batch.
    `row_pair` (R,), `col_pair` (C,): int64. `row_content` (R, K), `col_content` (C, K): int64 ids; pairs with an equal
    id in one column are false negatives of each other. `row_valid` (R,), `col_valid` (C,): bool, has an embedding.
    """

    similarity: Tensor
    rows: Tensor
    cols: Tensor
    row_pair: Tensor
    col_pair: Tensor
    row_content: Tensor
    col_content: Tensor
    row_valid: Tensor
    col_valid: Tensor


class OutcomeReward(NamedTuple):
    """(R,) each, NaN where unknown. `accuracy` in [0, 1]; `margin` in [-2, 2] for cosines; `outcome`: their product."""

    accuracy: Tensor
    margin: Tensor
    outcome: Tensor


class Retrieval(NamedTuple):
    """One direction's reward, and per row (R,) what metrics need.

    `hit`: 1.0 if the best positive is above every negative, else 0.0; NaN where unknown. `false_negatives`: int64
    number of valid columns left out because their pair shares a content with the row's; 0 for an invalid row.
    """

    reward: OutcomeReward
    hit: Tensor
    false_negatives: Tensor


class Ranks(NamedTuple):
    """(R,) each, NaN where unknown; means over the row's positives, or those of its best one.

    `rank`: 1 + the negatives ahead. `reciprocal`: 1 / rank. `outranked`: fraction of the negatives that are behind.
    """

    rank: Tensor
    reciprocal: Tensor
    outranked: Tensor


class _Block(NamedTuple):
    """Some rows of a direction; its tensors are overwritten by the next block.

    `positives_RP`: float64 in falling order, then -inf. `count_R`: int64 number of them, 0 for an invalid row.
    `negatives_RC`: float64, `_NONE` where a column is no negative. `false_negatives_R`: int64 number of them.
    `scratch_RC`: float64, for work.
    """

    positives_RP: Tensor
    count_R: Tensor
    negatives_RC: Tensor
    false_negatives_R: Tensor
    scratch_RC: Tensor


def _blocks(direction: Direction) -> Iterator[_Block]:
    """Positives and negatives of a direction with at least one column."""
    pair_C, order_C = direction.col_pair.sort(stable=True)
    first_R, end_R = (torch.searchsorted(pair_C, direction.row_pair, right=right) for right in (False, True))
    slot_P = torch.arange(max(1, int((end_R - first_R).max())), device=order_C.device)
    height = min(len(first_R), max(1, BLOCK_CELLS // len(order_C)))
    buffers = direction.similarity.new_empty(2, height, len(order_C), dtype=torch.float64)
    for start in range(0, len(first_R), height):
        rows = slice(start, start + height)
        scores_RC, scratch_RC = buffers[:, : len(first_R[rows])]
        part = direction.similarity[rows]  # of a transposed view, strided rows take twice the time of these two copies
        scores_RC.copy_(part if part.stride(1) == 1 else part.T.contiguous().T)
        scores_RC.nan_to_num_(nan=_NONE, posinf=math.inf, neginf=-math.inf)
        slot_RP = first_R[rows, None] + slot_P
        own_RP = order_C[slot_RP.clamp(max=len(order_C) - 1)]
        own_valid_RP = (slot_RP < end_R[rows, None]) & direction.col_valid[own_RP]
        positives_RP = scores_RC.gather(1, own_RP)
        known_RP = own_valid_RP & (positives_RP != _NONE) & direction.row_valid[rows, None]
        same_RC = shares_content(direction.row_content[rows], direction.col_content)  # the own pair's columns too
        same_R = (same_RC & direction.col_valid).sum(dim=1) * (first_R < end_R)[rows]
        yield _Block(
            positives_RP=positives_RP.masked_fill_(~known_RP, -math.inf).sort(dim=1, descending=True).values,
            count_R=known_RP.sum(dim=1),
            negatives_RC=scores_RC.masked_fill_(same_RC.logical_or_(~direction.col_valid), _NONE),
            false_negatives_R=(same_R - own_valid_RP.sum(dim=1)) * direction.row_valid[rows],
            scratch_RC=scratch_RC,
        )


@torch.no_grad()
def retrieval(direction: Direction, *, temperature: float = 0.5, accuracy: Accuracy = "share") -> Retrieval:
    """Outcome, Hit@1 and false negatives of every row; arguments, result and errors as in `outcome_reward`."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if accuracy not in ACCURACIES:
        raise ValueError(f"accuracy must be one of {', '.join(ACCURACIES)}; got {accuracy!r}")
    dtype = torch.promote_types(direction.similarity.dtype, torch.float32)
    if 0 in direction.similarity.shape:
        unknown = direction.similarity.new_full((len(direction.row_pair),), torch.nan, dtype=dtype)
        return Retrieval(OutcomeReward(unknown, unknown, unknown), unknown, torch.zeros_like(direction.row_pair))
    found = [(*_outcome(block, temperature), block.false_negatives_R) for block in _blocks(direction)]
    share, margin, hit, false_negatives = (torch.cat(parts) for parts in zip(*found, strict=True))
    infinite = (~share.isnan() & ~margin.isfinite()).nonzero()
    if len(infinite):
        raise ValueError(
            f"similarities of valid rows and columns must be finite, or NaN for unknown; row {int(infinite[0])} of "
            f"{len(margin)} has an infinite one. Mark failed embeddings in row_valid and col_valid"
        )
    acc = share.floor() if accuracy == "all" else share
    reward = OutcomeReward(acc.to(dtype), margin.to(dtype), (acc * margin).to(dtype))
    return Retrieval(reward, hit.to(dtype), false_negatives)


def _outcome(block: _Block, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Share on top, margin (not finite if a similarity is) and hit of a block's rows: (r,) float64 each."""
    positives_RP, count_R = block.positives_RP, block.count_R
    place_P = torch.arange(positives_RP.shape[1], device=count_R.device)
    best_negatives_RP = block.negatives_RC.topk(len(place_P), dim=1).values
    # The m-th best positive (from 0) is in the top G if it is above the (G - m)-th best negative.
    rival_RP = best_negatives_RP.gather(1, (count_R[:, None] - 1 - place_P).clamp_(min=0))
    on_top_RP = (positives_RP > rival_RP) & (place_P < count_R[:, None])
    share_R = on_top_RP.sum(dim=1) / count_R.double()

    weight_RC = torch.sub(block.negatives_RC, best_negatives_RP[:, :1], out=block.scratch_RC).div_(temperature).exp_()
    total_R = weight_RC.sum(dim=1)
    hard_R = weight_RC.mul_(block.negatives_RC).sum(dim=1) / total_R
    hard_R.masked_fill_(hard_R < _NONE / 2, 0.0)  # no negative
    margin_R = _mean_of_first(positives_RP, count_R) - hard_R
    hit_R = (positives_RP[:, 0] > best_negatives_RP[:, 0]).double()
    return share_R, margin_R, hit_R.masked_fill_(count_R == 0, torch.nan)


def _mean_of_first(values_RP: Tensor, count_R: Tensor) -> Tensor:
    """(R,) mean of the first `count_R` entries of a row; NaN for none."""
    beyond_RP = torch.arange(values_RP.shape[1], device=count_R.device) >= count_R[:, None]
    return values_RP.masked_fill(beyond_RP, 0.0).sum(dim=1) / count_R


@torch.no_grad()
def ranks(
    direction: Direction, *, temperature: float | None = None, by_pair: bool = False, positives: Positives = "mean"
) -> Ranks:
    """Ranks of every row's positives p among its negatives: 1 + ahead_p.

        hard: ahead_p = sum over Neg(i) of w_j [S_ij >= S_ip]
        soft: ahead_p = sum over Neg(i) of w_j sigmoid((S_ij - S_ip) / temperature)     a tie is one half

    Args:
        temperature: None for hard ranks.
        by_pair: w_j is 1 over the number of valid columns of j's pair, so that a pair counts once; else w_j = 1.
        positives: "mean" over the ranks of all positives, or only the "best" positive (highest similarity).

    Returns:
        Tensors of the dtype of `similarity` (float32 for half precision). NaN for rows that are invalid, or have no
        valid positive, or no negative: there is nothing that they could be ranked against.
    """
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be None (hard ranks), or positive and finite; got {temperature}")
    if positives not in POSITIVES:
        raise ValueError(f"positives must be one of {', '.join(POSITIVES)}; got {positives!r}")
    dtype = torch.promote_types(direction.similarity.dtype, torch.float32)
    if 0 in direction.similarity.shape:
        return Ranks(*direction.similarity.new_full((3, len(direction.row_pair)), torch.nan, dtype=dtype))
    weight_C = torch.ones_like(direction.col_pair, dtype=torch.float64)
    if by_pair:
        pair_C: Tensor = torch.unique(direction.col_pair, return_inverse=True)[1]
        weight_C = 1 / torch.bincount(pair_C, direction.col_valid.double()).clamp(min=1)[pair_C]
    found = []
    for block in _blocks(direction):
        count_R = block.count_R.clamp(max=1) if positives == "best" else block.count_R
        negatives_RC, scratch_RC = block.negatives_RC, block.scratch_RC
        total_R = torch.gt(negatives_RC, _NONE, out=scratch_RC).mul_(weight_C).sum(dim=1)
        if temperature is not None:
            negatives_RC = negatives_RC.div_(temperature)
        ahead_RP = torch.zeros_like(block.positives_RP)
        for place in range(int(count_R.max())):
            own_R1 = block.positives_RP[:, place, None]
            if place > 0 and own_R1.equal(block.positives_RP[:, place - 1, None]):  # raw inputs: one vector a prompt
                ahead_RP[:, place] = ahead_RP[:, place - 1]
            elif temperature is None:
                ahead_RP[:, place] = torch.ge(negatives_RC, own_R1, out=scratch_RC) @ weight_C
            else:
                share_RC = torch.sub(negatives_RC, own_R1 / temperature, out=scratch_RC).sigmoid_()
                ahead_RP[:, place] = share_RC.mul_(weight_C).sum(dim=1)
        count_R = count_R.masked_fill(total_R == 0, 0)
        if temperature is None:
            ahead_RP, total_R = ((value / _RANK_GRID).round() * _RANK_GRID for value in (ahead_RP, total_R))
        parts = (1 + ahead_RP, 1 / (1 + ahead_RP), 1 - ahead_RP / total_R[:, None])
        found.append(torch.stack([_mean_of_first(part, count_R) for part in parts]))
    return Ranks(*torch.cat(found, dim=1).to(dtype))


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
        similarity: (R, C) float, NaN = an unknown candidate of that row.
        row_pair, col_pair: (R,), (C,) int, pair of each row and column.
        col_content: (C, 2) int, ids of the query's and the target's content of each column's pair (`content_id`); or
            (C, K) or (C,) for other kinds of ids. A column of another pair that shares an id with one of the row's own
            columns (valid or not) is a false negative and left out. Without it every other pair is a negative.
        col_valid, row_valid: (C,), (R,) bool, False where the embedding failed: nobody's candidate; an unknown row.
        temperature: tau of the softmax weights of the negatives.
        accuracy: "share" = the share of the row's top G that are positives; "all" = 1 if all are, else 0.

    Returns:
        (R,) tensors of the dtype of `similarity` (float32 for half precision). NaN for rows that are invalid or have no
        valid positive. Without any negative the margin is the mean of the positives.

    Raises:
        ValueError: shapes, dtypes, temperature or accuracy are wrong, or a valid row's similarities are infinite.
    """
    ids = {"row_pair": row_pair, "col_pair": col_pair, "col_content": col_content}
    _check_direction(similarity, **ids, row_valid=row_valid, col_valid=col_valid)
    row_pair, col_pair = row_pair.to(torch.int64), col_pair.to(torch.int64)
    content = (col_pair if col_content is None else col_content).to(torch.int64)
    row_content, col_content = _contents(row_pair, col_pair, content[:, None] if content.dim() == 1 else content)
    direction = Direction(
        similarity=similarity,
        rows=torch.arange(len(row_pair)),
        cols=torch.arange(len(col_pair)),
        row_pair=row_pair,
        col_pair=col_pair,
        row_content=row_content,
        col_content=col_content,
        row_valid=torch.ones_like(row_pair, dtype=torch.bool) if row_valid is None else row_valid,
        col_valid=torch.ones_like(col_pair, dtype=torch.bool) if col_valid is None else col_valid,
    )
    return retrieval(direction, temperature=temperature, accuracy=accuracy).reward


def _contents(row_pair: Tensor, col_pair: Tensor, col_content: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K m) contents of each row's own columns, and (C, K m) those of the columns, m times: a pair shows up to m
    different ones (normally 1). A row without own columns has any content.
    """
    shown = torch.unique(torch.cat((col_pair[:, None], col_content), dim=1), dim=0)  # sorted by pair
    pair, shown = shown[:, 0].contiguous(), torch.cat((shown[:, 1:], shown.new_zeros(1, shown.shape[1] - 1)))
    first, end = (torch.searchsorted(pair, row_pair, right=right) for right in (False, True))
    most = max(1, int((end - first).max())) if len(row_pair) else 1
    own = [shown[(first + n).minimum(end - 1)] for n in range(most)]
    return torch.cat(own, dim=1), col_content.repeat(1, most)


def similarity_matrix(query: Tensor, target: Tensor) -> Tensor:
    """Cosines of unit vectors, each the same bits wherever its row and column stand, and equal for equal vectors.

    Components are rounded to 2**-26. Their products lie on 2**-52, so float64 holds every partial sum below 2 exactly:
    no order, batch size or BLAS can matter, and equal T-CoTs tie. It moves a cosine by less than float32 does.

    Args:
        query: (R, D) float, rows of length 1.
        target: (C, D) float, likewise.

    Returns:
        (R, C) float32. `similarity_matrix(b, a)` is exactly the transpose of `similarity_matrix(a, b)`.
    """
    result = torch.empty(len(query), len(target), dtype=torch.float32, device=query.device)
    right = _on_grid(target).T
    for start in range(0, len(query), _PRODUCT_ROWS):
        block = slice(start, start + _PRODUCT_ROWS)
        result[block] = _on_grid(query[block]) @ right
    return result


def _on_grid(vectors: Tensor) -> Tensor:
    return (vectors.double() * 2.0**26).round_().mul_(2.0**-26)


def _check_direction(similarity: Tensor, **ids: Tensor | None) -> None:
    """Refuse ids and masks that do not fit the similarities."""
    if similarity.dim() != 2 or not similarity.is_floating_point():
        raise ValueError(
            f"similarity must be a (R, C) float tensor; got shape {tuple(similarity.shape)}, {similarity.dtype}"
        )
    for name, value in ids.items():
        if value is None:
            continue
        size, boolean = similarity.shape[name.startswith("col")], name.endswith("valid")
        kinds_of_ids = name == "col_content" and value.dim() == 2 and value.shape[1] > 0
        if value.shape[:1] != (size,) or not (value.dim() == 1 or kinds_of_ids):
            shape = f"({size},) or ({size}, K)" if name == "col_content" else f"({size},)"
            got, of = tuple(value.shape), tuple(similarity.shape)
            raise ValueError(f"{name} must have shape {shape} for similarity {of}; got {got}")
        if (value.dtype == torch.bool) != boolean or value.is_floating_point():
            raise ValueError(f"{name} must be {'bool' if boolean else 'an integer tensor'}; got {value.dtype}")
