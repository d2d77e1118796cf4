# SPDX-License-Identifier: Apache-2.0
"""Processes and ports that tests look at while others come and go."""

from __future__ import annotations

import os
import socket
from itertools import count
from pathlib import Path

_PORTS = range(20000, 32000)  # below those that the system, and above those that Ray, gives to whoever asks for any
_numbers = count(os.getpid() * 97)


def alive(pid: int) -> bool:
    """Whether a process runs: there is one with this number that is no zombie (asked for once: it may go meanwhile)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens, and that no other process is given unless it asks for this one."""
    for number in _numbers:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port := _PORTS[number % len(_PORTS)]))
            except OSError:
                continue
            return port
    raise AssertionError("counting does not end")
