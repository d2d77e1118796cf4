# SPDX-License-Identifier: Apache-2.0
"""What a job of curation says at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedrl_verl.errors import DataError


@dataclass(frozen=True)
class JobReport:
    """`values` go to the JSON file; `lines` are for people."""

    values: dict[str, Any]
    lines: list[str]

    @property
    def exit_code(self) -> int:
        """0, or 3 if rows were left out."""
        return DataError.exit_code if self.values["rejected"] else 0


def table(*rows: Sequence[object]) -> list[str]:
    """Rows, the head among them, in columns: numbers to the right, the first and the last column to the left."""
    last = len(rows[0]) - 1
    widths = [max(len(str(row[column])) for row in rows) for column in range(last + 1)]
    cells = [
        [f"{row[at]!s:{'<' if at in (0, last) else '>'}{width}}" for at, width in enumerate(widths)] for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
