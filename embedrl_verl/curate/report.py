# SPDX-License-Identifier: Apache-2.0
"""What a job of curation says at its end."""

from __future__ import annotations

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
