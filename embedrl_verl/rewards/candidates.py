# SPDX-License-Identifier: Apache-2.0
"""Who is a positive and who is a negative of a row: the masks of method section 4.

For row i of pair g: Pos(i) = the columns of pair g. Neg(i) = all other columns except false negatives, whose pair has
the same query or the same target (`embedrl_verl.data.identity.shares_content`). Columns whose embedding failed, and
cells that are NaN, are in neither.

The masks are never built as a matrix: columns are sorted by pair and by content once, so that a row's own columns, and
those that show its contents, are a few ranges of a sorted list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for "no candidate": finite, so that 0 weight times it is 0, and far below every similarity.
NO_CANDIDATE = -1e200
# Cells of one block: its two float64 work buffers (2 MiB each) stay in the CPU's cache.
BLOCK_CELLS = 2**18


@dataclass(frozen=True)
class ColumnLists:
    """One list of columns for every row: `count[i]` entries of `order` (C,) from `start[i]`; both (R,) int64."""

    order: Tensor
    start: Tensor
    count: Tensor

    @classmethod
    def of(cls, keys: Tensor, wanted: Tensor) -> ColumnLists:
        """For every row the columns whose key (C,) is the row's `wanted` (R,) one."""
        ordered, order = keys.sort(stable=True)
        start = torch.searchsorted(ordered, wanted)
        return cls(order, start, torch.searchsorted(ordered, wanted, right=True) - start)

    def columns(self, rows: slice) -> Tensor:
        """(r, K) with K = the longest list of `rows`, at least 1; shorter ones repeat their last entry."""
        start, count = self.start[rows, None], self.count[rows, None]
        slot = torch.arange(max(1, int(count.max())), device=start.device).minimum((count - 1).clamp_(min=0))
        return self.order[(start + slot).clamp_(max=len(self.order) - 1)]


def own_columns(row_pair: Tensor, col_pair: Tensor) -> tuple[Tensor, Tensor]:
    """(R, P) columns of each row's pair, P at least 1, and (R, P) bool: which entries are real."""
    lists = ColumnLists.of(col_pair, row_pair)
    columns = lists.columns(slice(None))
    return columns, torch.arange(columns.shape[1], device=columns.device) < lists.count[:, None]


def columns_with_own_content(row_pair: Tensor, col_pair: Tensor, col_content: Tensor) -> list[ColumnLists]:
    """Per row every column that shares an id with one of its own pair's columns, itself included.

    For each of the K kinds of ids (`col_content` is (C,) or (C, K)) one list a row for its pair's first id, one for the
    second and so on (a pair normally has one). A row with fewer ids has empty lists; so has a row whose pair has no
    column. A column may stand in several lists.
    """
    if col_content.dim() == 2:
        return [one for ids in col_content.T for one in columns_with_own_content(row_pair, col_pair, ids.contiguous())]
    pairs, pair = torch.unique(col_pair, return_inverse=True)
    contents, content = torch.unique(col_content, return_inverse=True)
    entries = torch.unique(pair * len(contents) + content)  # each pair with each of its contents, sorted by pair
    shown = contents[entries % len(contents)]
    found = ColumnLists.of(pairs[entries // len(contents)], row_pair)
    result = []
    for number in range(max(1, int(found.count.max()))):
        lists = ColumnLists.of(col_content, shown[(found.start + number).clamp(max=len(entries) - 1)])
        result.append(ColumnLists(lists.order, lists.start, lists.count * (number < found.count)))
    return result


@dataclass(frozen=True)
class Candidates:
    """What `find_candidates` says of R rows.

    `positives`: (R, P) float64, a row's valid positives in falling order, then -inf; P at least 1. `count`: (R,) int64
    number of them, 0 for an invalid row. `own`: (R,) int64 valid columns of the row's pair, NaN cells too. `hidden`:
    columns that are no negatives of a row.
    """

    positives: Tensor
    count: Tensor
    own: Tensor
    hidden: list[ColumnLists]


def find_candidates(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    col_content: Tensor | None,
    col_valid: Tensor | None,
    row_valid: Tensor | None,
) -> Candidates:
    """The positives of every row of one direction and the columns that are no negatives; arguments as
    `outcome_reward`, R and C positive."""
    row_pair, col_pair = row_pair.to(torch.int64), col_pair.to(torch.int64)
    columns, listed = own_columns(row_pair, col_pair)
    valid = torch.ones_like(col_pair, dtype=torch.bool) if col_valid is None else col_valid
    listed &= valid[columns]
    hidden = columns_with_own_content(row_pair, col_pair, col_pair if col_content is None else col_content)
    own = listed.sum(dim=1)
    positives = similarity.gather(1, columns).double()
    listed &= ~positives.isnan()
    if row_valid is not None:
        listed &= row_valid[:, None]
    positives = positives.masked_fill_(~listed, -torch.inf).sort(dim=1, descending=True).values
    return Candidates(positives, listed.sum(dim=1), own, hidden)


def iter_negatives(
    similarity: Tensor, hidden: list[ColumnLists], col_valid: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk over the rows of one direction, a few at a time, so that memory beside S does not grow.

    Args:
        similarity: (R, C) float, R and C positive; also a transposed view.
        hidden: columns that are no negatives of a row.
        col_valid: (C,) bool, False = nobody's negative.

    Yields:
        Which rows; (r, C) float64 scores, `NO_CANDIDATE` where the column is no negative (NaN stays NaN); (r, C)
        float64 uninitialised. The caller may overwrite both, and must be done with them before the next block.
    """
    rows, cols = similarity.shape
    height = max(1, min(rows, BLOCK_CELLS // cols))
    buffer, scratch = torch.empty(2, height, cols, dtype=torch.float64, device=similarity.device)
    read = _row_reader(similarity, height)
    failed = None if col_valid is None else (~col_valid).nonzero()[:, 0]
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        scores = buffer[: block.stop - start].copy_(read(block))
        for lists in hidden:
            # A row's empty list repeats some column of others: it must not be hidden from this row.
            columns = lists.columns(block)
            value = scores.gather(1, columns).masked_fill_(lists.count[block, None] > 0, NO_CANDIDATE)
            scores.scatter_(1, columns, value)
        if failed is not None and len(failed):
            scores.index_fill_(1, failed, NO_CANDIDATE)
        yield block, scores, scratch[: len(scores)]


def _row_reader(matrix: Tensor, height: int) -> Callable[[slice], Tensor]:
    """Up to `height` rows at a time, also of a transposed view: copying its columns and transposing the copy takes half
    the time of reading strided rows."""
    if matrix.stride(1) == 1:
        return matrix.__getitem__
    cols = matrix.shape[1]
    tall, wide = matrix.new_empty(cols * height), matrix.new_empty(height, cols)

    def read(rows: slice) -> Tensor:
        part = matrix[rows].T
        return wide[: part.shape[1]].copy_(tall[: part.numel()].view(part.shape).copy_(part).T)

    return read


def check_direction(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    col_content: Tensor | None,
    col_valid: Tensor | None,
    row_valid: Tensor | None,
) -> None:
    """Refuse what is no direction.

    Raises:
        ValueError: `similarity` is not (R, C) float, or ids and masks have other shapes or dtypes.
    """
    if similarity.dim() != 2 or not similarity.is_floating_point():
        raise ValueError(
            f"similarity must be a (R, C) float tensor; got shape {tuple(similarity.shape)}, {similarity.dtype}"
        )
    rows, cols = similarity.shape
    for name, value, size, boolean in (
        ("row_pair", row_pair, rows, False),
        ("col_pair", col_pair, cols, False),
        ("col_content", col_content, cols, False),
        ("col_valid", col_valid, cols, True),
        ("row_valid", row_valid, rows, True),
    ):
        if value is None:
            continue
        kinds_of_ids = name == "col_content" and value.dim() == 2 and value.shape[1] > 0
        if value.shape[:1] != (size,) or not (value.dim() == 1 or kinds_of_ids):
            shape = f"({size},) or ({size}, K)" if name == "col_content" else f"({size},)"
            raise ValueError(f"{name} must have shape {shape} for similarity {(rows, cols)}; got {tuple(value.shape)}")
        if (value.dtype == torch.bool) != boolean or value.is_floating_point():
            raise ValueError(f"{name} must be {'bool' if boolean else 'an integer tensor'}; got {value.dtype}")
