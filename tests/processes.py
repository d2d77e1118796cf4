# SPDX-License-Identifier: Apache-2.0
"""Processes that tests look at while they come and go."""

from __future__ import annotations

from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs: there is one with this number that is no zombie (asked for once: it may go meanwhile)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
