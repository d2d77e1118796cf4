# SPDX-License-Identifier: Apache-2.0
"""Runs a command that ends with its owner, however the owner ends.

    python guard.py COMMAND...        standard input: a pipe whose other end the owner holds

The command runs in a process group of its own. The whole group is ended when the pipe closes (the owner closed it, or
was killed), when the guard gets SIGTERM or SIGINT, and when the command itself ends: vLLM's engine processes would
outlive a server that was killed. The exit status is the command's. Standard library only, so that it starts at once.

A guard is two processes, of which the owner knows the outer one. Ray kills the children of a process that it ends, so
the outer one may be gone before it can do anything; the inner one sees that by a pipe of its own.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
INNER = "--inner"


def _end_group(group: int, grace_s: float) -> None:
    """SIGTERM to all of the group, SIGKILL to what is left of it after `grace_s`."""
    until = time.monotonic() + grace_s
    try:
        os.killpg(group, signal.SIGTERM)
        os.killpg(group, signal.SIGCONT)  # a stopped process would not see the first
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _when_told_to_end(end: Callable[[], None]) -> None:
    """Call `end` at a signal, and when standard input is closed."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        end()

    def watch_owner() -> None:
        while os.read(0, 1):
            pass
        end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    threading.Thread(target=watch_owner, daemon=True).start()


def outer(command: list[str]) -> int:
    """Run the inner guard; returns its exit status."""
    inner = [sys.executable, "-I", os.path.abspath(__file__), INNER, *command]
    child = subprocess.Popen(inner, stdin=subprocess.PIPE, start_new_session=True)
    pipe = child.stdin
    assert pipe is not None
    _when_told_to_end(pipe.close)
    return child.wait()


def inner(command: list[str]) -> int:
    """Run the command; returns its exit status, 128 + n for signal n."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Event()

    def end() -> None:
        if not ending.is_set():
            ending.set()
            threading.Thread(target=_end_group, args=(child.pid, GRACE_S)).start()

    _when_told_to_end(end)
    status = child.wait()
    _end_group(child.pid, GRACE_S if ending.is_set() else 0.0)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    words = sys.argv[1:]
    code = inner(words[1:]) if words[0] == INNER else outer(words)
    os._exit(code)  # the thread that reads the pipe may still wait
