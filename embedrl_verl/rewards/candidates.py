# SPDX-License-Identifier: Apache-2.0
"""Who is a positive and who is a negative of a row: the masks of method section 4, block by block.

For row i of pair g: Pos(i) = the columns of pair g. Neg(i) = all other columns except false negatives, which show the
same content as a positive. Columns whose embedding failed, and cells that are NaN, are in neither. A block holds a few
rows, so memory beside the similarity matrix does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Cells of one block: its float64 work buffers (2 MiB each) stay in the CPU's cache.
BLOCK_CELLS = 2**18


@dataclass(frozen=True)
class Block:
    """Some rows of one direction; P = the largest number of positives of a row in the block, C = all columns.

    `rows`: which rows. `positives`: (r, P) scores in falling order, -inf where a row has fewer. `positive_count`: (r,)
    int64.
    `negatives`: (r, C) scores, -inf where the column is no negative (a work buffer: valid until the next block).
    `top_negatives`: (r, P) the largest of them in falling order. `false_negatives`: (r,) int64, valid columns of
    other pairs that are left out because they show the content of a positive. Scores are float32, or float64 if given
    so.
    """

    rows: slice
    positives: Tensor
    positive_count: Tensor
    negatives: Tensor
    top_negatives: Tensor
    false_negatives: Tensor


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
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    height = max(1, min(rows, BLOCK_CELLS // cols))
    buffer = torch.empty(height, cols, dtype=dtype, device=similarity.device)
    content = None if col_content is None else torch.unique(col_content, return_inverse=True)[1]
    transposed = similarity.stride(0) == 1 and cols > 1
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        source = similarity[block]
        # A strided read of a narrow slice is slow; torch transposes a contiguous one fast.
        scores = buffer[: source.shape[0]].copy_(source.T.contiguous().T if transposed else source)
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
        yield Block(block, positives, listed.sum(dim=1), scores, top, false_negatives[pair_of_row])


def _excluded(own: Tensor, content: Tensor | None, col_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p, C) columns that are no negatives of a pair, and (p,) how many valid ones are false negatives."""
    excluded = own.clone()
    false_negatives = torch.zeros(own.shape[0], dtype=torch.int64, device=own.device)
    if content is not None:
        pair, column = own.nonzero(as_tuple=True)
        shown = torch.zeros_like(own)  # content ids are dense and thus below C
        shown[pair, content[column]] = True
        same = shown.index_select(1, content).logical_and_(~own)
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
