# SPDX-License-Identifier: Apache-2.0
"""T-CoTs of one side of a task as JSON lines: those that a run keeps, and those that a user gives."""

from __future__ import annotations

import json
from pathlib import Path

from embedrl_verl.errors import DataError
from embedrl_verl.model import Written
from embedrl_verl.model.pair import Encoding


def tcot_line(name: str, one: Encoding) -> str:
    """Of the item `name`."""
    line = {"id": name, "tcot": one.tcot, "seen_sizes": one.seen_sizes}
    return json.dumps(line if one.tcot is not None else {**line, "problem": one.problem}, ensure_ascii=False) + "\n"


def read_tcots(file: Path) -> dict[str, Written]:
    """T-CoTs by item id. A line is {"id", "tcot"}, and may have `seen_sizes`, (width, height) of the images as the
    Reasoner saw them; a `tcot` of null has a `problem`."""
    found = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):  # of a text it would also end at U+2028
        try:
            row = json.loads(line)
            sizes = row.get("seen_sizes")
            seen = None if sizes is None else tuple((int(width), int(height)) for width, height in sizes)
            found[str(row["id"])] = Written(row["tcot"], seen, row.get("problem", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{file}, line {number}: must be {{"id": ..., "tcot": ...}}; got {line[:60].decode(errors="replace")!r}'
            ) from error
    return found
