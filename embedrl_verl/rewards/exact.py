# SPDX-License-Identifier: Apache-2.0
"""Arithmetic whose result does not depend on the order of its terms.

Float sums change in the last bits when their terms are reordered, so permuted rows would get slightly different rewards
and two equal T-CoTs slightly different scores (a tie that is none). Here every term is first rounded to a multiple of
one power of two, chosen so that float64 holds every partial sum of such multiples exactly. Then no order, block size,
thread count, fused multiply-add or BLAS can matter, and what is lost by rounding is far below the noise of a float32
embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 52
# Components of a unit vector on a grid of 2**-26: products lie on 2**-52, so sums below 2 fit into float64's 53 bits.
_COMPONENT_BITS = 26
_BLOCK_ROWS = 1024


def snap_(terms: Tensor, count: int) -> Tensor:
    """Round float64 `terms` in [-1, 1], in place, so that any sum of up to `count` of them is exact ([-2, 2]: give 4
    times it).

    The grid is 2**(bit_length(count) - 52): 2e-12 for 4,096 terms. NaN stays NaN. Returns `terms`.
    """
    magic = 1.5 * 2.0 ** count.bit_length()  # its spacing is the grid, and adding a term does not leave its binade
    return terms.add_(magic).sub_(magic)


def mean_of_first(values: Tensor, count: Tensor) -> Tensor:
    """(R,) mean of the first `count` (R,) entries of (R, P) float64; NaN for none.

    They are added in their order: sort rows by value, and the result is independent of the order of the columns.
    """
    total = torch.zeros_like(values[:, 0])
    for place, entries in enumerate(values.unbind(dim=1)):
        total += entries.masked_fill(place >= count, 0.0)
    return total / count


def similarity_matrix(query: Tensor, target: Tensor) -> Tensor:
    """Cosines of unit vectors, each the same bits wherever its row and column stand, and equal for equal vectors.

    Args:
        query: (R, D) float, rows of length 1 (up to 1.4 is exact).
        target: (C, D) float, likewise.

    Returns:
        (R, C) float32. `similarity_matrix(b, a)` is exactly the transpose of `similarity_matrix(a, b)`.
        Components are rounded to 2**-26, which moves a cosine by less than a float32 product's own rounding does.
    """
    right = snap_components(target).T
    result = torch.empty(query.shape[0], target.shape[0], dtype=torch.float32, device=query.device)
    buffer = torch.empty(_BLOCK_ROWS, target.shape[0], dtype=torch.float64, device=query.device)
    for start in range(0, query.shape[0], _BLOCK_ROWS):
        rows = result[start : start + _BLOCK_ROWS]
        left = snap_components(query[start : start + _BLOCK_ROWS])
        rows.copy_(torch.mm(left, right, out=buffer[: len(rows)]))
    return result


def snap_components(vectors: Tensor) -> Tensor:
    """(N, D) float64 copy of unit vectors whose products and sums of products are exact."""
    magic = 1.5 * 2.0 ** (_MANTISSA_BITS - _COMPONENT_BITS)
    return vectors.to(torch.float64, copy=True).add_(magic).sub_(magic)
