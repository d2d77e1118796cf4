# SPDX-License-Identifier: Apache-2.0
"""What a recipe calls Python with, as a script that stands in for Python writes it down."""

from __future__ import annotations

from pathlib import Path


def recording(file: str, arguments: str = '"$@"', *, without: str = "") -> str:
    """The first lines of a stand-in: they append the shell words `arguments`, as one record, to the shell word `file`.
    A call of the module `without` does nothing.

    Under a lock: stages run at once, and one printf is two writes, before and after the line feed.
    """
    return f"""#!/usr/bin/env bash
[[ "${{2:-}}" != "{without or "-"}" ]] || exit 0
exec 9>>{file}.lock && flock 9
printf '%s\\0' {arguments} $'\\n' >>{file}
exec 9>&-
"""


def recorded(file: Path) -> list[list[str]]:
    """The arguments of each call in the order of the calls; none where `file` does not exist."""
    calls = file.read_text().split("\0\n\0")[:-1] if file.exists() else []
    return [call.split("\0") for call in calls]
