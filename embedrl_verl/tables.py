# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(*rows: Sequence[object], left: Sequence[int] = (0,)) -> list[str]:
    """Rows, the head among them, in columns: numbers with their thousands, to the right but for the columns `left`."""
    shown = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    cells = [
        [
            f"{cell:{'<' if at in left else '>'}{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in shown
    ]
    return ["  ".join(row).rstrip() for row in cells]
