# SPDX-License-Identifier: Apache-2.0
"""Who is a positive and who is a negative of a row: the masks of method section 4, block by block.

For row i of pair g: Pos(i) = the columns of pair g. Neg(i) = all other columns except false negatives, which show the
same content as a positive. Columns whose embedding failed, and cells that are NaN, are in neither. A block holds a few
rows, so memory beside the similarity matrix does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Cells of one block: its two float64 work buffers (4 MiB each) stay in the CPU's cache.
BLOCK_CELLS = 2**19


@dataclass(frozen=True)
class Block:
    """Some rows of one direction; P = the largest number of positives of a row in the block (at least 1), C = all
    columns.

    `rows`: which rows. `positives`: (r, P) float64 in falling order, -inf where a row has fewer. `positive_count`: (r,)
    int64. `negatives`: (r, C) float64, -inf where the column is no negative. `top_negatives`: (r, P) float64, the
    largest of them in falling order. `false_negatives`: (r,) int64, valid columns of other pairs left out because they
    show the content of a positive. `scratch`: (r, C) float64, uninitialised. The reader may overwrite `negatives` and
    `scratch`, and must be done with them before asking for the next block, which reuses their memory.
    """

    rows: slice
    positives: Tensor
    positive_count: Tensor
    negatives: Tensor
    top_negatives: Tensor
    false_negatives: Tensor
    scratch: Tensor


def iter_blocks(
    similarity: Tensor,
    row_pair: Tensor,
    col_pair: Tensor,
    col_content: Tensor | None,
    col_valid: Tensor | None,
) -> Iterator[Block]:
    """Walk over the rows of one direction. Shapes as in `outcome_reward`, which checks them; C must be positive.

    Rows of one pair should be adjacent: the masks are made once a pair and block.
    """
    rows, cols = similarity.shape
    height = max(1, min(rows, BLOCK_CELLS // cols))
    buffer, scratch = torch.empty(2, height, cols, dtype=torch.float64, device=similarity.device)
    read = _row_reader(similarity, height)
    content = None if col_content is None else torch.unique(col_content, return_inverse=True)[1]
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        scores = buffer[: block.stop - start].copy_(read(block))
        pairs, pair_of_row = torch.unique(row_pair[block], return_inverse=True)
        own = pairs[:, None] == col_pair[None, :]
        excluded, false_negatives = _excluded(own, content, col_valid)
        if col_valid is not None:
            own &= col_valid
        columns, listed = _columns_of(own)
        columns, listed = columns[pair_of_row], listed[pair_of_row]
        positives = scores.gather(1, columns)
        listed &= ~positives.isnan()
        positives = positives.masked_fill_(~listed, -torch.inf).sort(dim=1, descending=True).values
        scores.masked_fill_(excluded[pair_of_row], -torch.inf)
        top = scores.topk(columns.shape[1], dim=1).values
        if top[:, 0].isnan().any():  # NaN sorts first: masking it is paid only where there is one
            scores.masked_fill_(scores.isnan(), -torch.inf)
            top = scores.topk(top.shape[1], dim=1).values
        yield Block(
            rows=block,
            positives=positives,
            positive_count=listed.sum(dim=1),
            negatives=scores,
            top_negatives=top,
            false_negatives=false_negatives[pair_of_row],
            scratch=scratch[: len(scores)],
        )


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


def _excluded(own: Tensor, content: Tensor | None, col_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p, C) columns that are no negatives of a pair, and (p,) how many valid ones are false negatives."""
    excluded = own.clone()
    false_negatives = torch.zeros(own.shape[0], dtype=torch.int64, device=own.device)
    if content is not None:
        pair, column = own.nonzero(as_tuple=True)
        shown = torch.zeros_like(own)  # content ids are dense and thus below C
        shown[pair, content[column]] = True
        same = shown.gather(1, content.expand(len(own), -1)).logical_and_(~own)
        excluded |= same
        false_negatives = (same if col_valid is None else same & col_valid).sum(dim=1)
    if col_valid is not None:
        excluded |= ~col_valid
    return excluded, false_negatives


def _columns_of(own: Tensor) -> tuple[Tensor, Tensor]:
    """(p, P) column indices of each pair (P at least 1), and (p, P) bool: which are real (the others are 0)."""
    pair, column = own.nonzero(as_tuple=True)
    count = own.sum(dim=1)
    width = max(1, int(count.max()))
    slot = torch.arange(len(pair), device=own.device) - (count.cumsum(0) - count)[pair]
    columns = torch.zeros(own.shape[0], width, dtype=torch.int64, device=own.device)
    columns[pair, slot] = column
    return columns, torch.arange(width, device=own.device) < count[:, None]
