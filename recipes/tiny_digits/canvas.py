# SPDX-License-Identifier: Apache-2.0
"""Pictures of real handwritten digits on a grid of cells, one cell = one visual token.

The 1,797 scans of scikit-learn's `load_digits` (8 x 8 pixels) are split by index: a scan is used either in training or
in the held-out evaluation. A canvas is white paper; a strip of digits lies in one row of cells, so the true box of a
strip, and the digit that each visual token shows, are known exactly.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

# Scan indices [first, past the last).
TRAIN_SCANS = (0, 1300)
HELD_OUT_SCANS = (1300, 1797)
_INK = 15.0  # darkness of full ink: scans hold 0..16


@cache
def _scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


@cache
def _cell_ink(scan: int, side: int) -> npt.NDArray[np.uint8]:
    """One scan, dark on white, as uint8 (side, side)."""
    ink = np.clip(255.0 - _INK * _scans()[0][scan], 0.0, 255.0).astype(np.uint8)
    return np.asarray(Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC))


class ScanBox:
    """Hands out scans of one index range, digit by digit, at random."""

    def __init__(self, span: tuple[int, int], rng: np.random.Generator) -> None:
        labels = _scans()[1][span[0] : span[1]]
        self._rng = rng
        self._of_digit = [np.flatnonzero(labels == digit) + span[0] for digit in range(10)]

    def draw(self, code: str) -> list[int]:
        """One random scan index for each digit of `code`."""
        return [int(self._rng.choice(self._of_digit[int(digit)])) for digit in code]


@dataclass(frozen=True)
class Strip:
    """Scans side by side in one row of cells; row and column count cells from 0."""

    row: int
    column: int
    scans: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Size of a canvas in cells and the side of a cell in pixels (28, for Qwen3-VL 32)."""

    rows: int
    columns: int
    cell: int = 28

    def box(self, strip: Strip, *, relative: bool = True) -> list[int]:
        """True box [x1, y1, x2, y2] of a strip: 0..1000 of width and height, or pixels of the canvas."""
        edges = (strip.column, strip.row, strip.column + len(strip.scans), strip.row + 1)
        if not relative:
            return [edge * self.cell for edge in edges]
        sizes = (self.columns, self.rows, self.columns, self.rows)
        return [round(1000 * edge / size) for edge, size in zip(edges, sizes, strict=True)]


def draw_canvas(grid: Grid, strips: Sequence[Strip], *, printed: str = "") -> Image.Image:
    """Strips of scans, and a printed line in the first row of cells, dark on white: a grey image (mode L)."""
    paper = np.full((grid.rows * grid.cell, grid.columns * grid.cell), 255, dtype=np.uint8)
    for strip in strips:
        for offset, scan in enumerate(strip.scans):
            top, left = strip.row * grid.cell, (strip.column + offset) * grid.cell
            paper[top : top + grid.cell, left : left + grid.cell] = _cell_ink(scan, grid.cell)
    canvas = Image.fromarray(paper)
    if printed:
        font = ImageFont.load_default(size=0.75 * grid.cell)
        ImageDraw.Draw(canvas).text((grid.cell / 7, 0), printed, fill=0, font=font)
    return canvas


def digit_of_cells(grid: Grid, strips: Sequence[Strip]) -> tuple[int, ...]:
    """The digit shown in each cell, row by row; -1 where there is none."""
    cells = [-1] * (grid.rows * grid.columns)
    for strip in strips:
        for offset, scan in enumerate(strip.scans):
            cells[strip.row * grid.columns + strip.column + offset] = int(_scans()[1][scan])
    return tuple(cells)


def png_bytes(image: Image.Image) -> bytes:
    """Encoded losslessly; the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
