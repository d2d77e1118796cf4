# SPDX-License-Identifier: Apache-2.0
"""Processes that tests start, look at and kill. Python runs in forks of the server that conftest.py keeps."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.environment import CPU_ENV


def alive(pid: int) -> bool:
    """Whether a process runs: there is one with this number that is no zombie (asked for once: it may go meanwhile)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def start(arguments: Sequence[str], output: Path, environment: Mapping[str, str] = CPU_ENV) -> subprocess.Popen[bytes]:
    """Start `python ARGUMENTS`; what it prints goes to the file `output`."""
    with output.open("ab") as file:
        return subprocess.Popen(
            [python(), *arguments], env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what `start` has started, with all that it has started."""
    process.kill()
    process.wait()
    subprocess.run([python(), "-c", ""], check=True)  # the fork server has seen the end of that process before this one


def run(
    arguments: Sequence[str], output: Path, environment: Mapping[str, str] = CPU_ENV, *, timeout_s: float = 600
) -> tuple[int, str]:
    """`start` to the end: its exit code and what it has printed."""
    process = start(arguments, output, environment)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return code, output.read_text()
