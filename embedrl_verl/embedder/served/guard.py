# SPDX-License-Identifier: Apache-2.0
"""Runs a command that ends with its owner, however the owner ends.

    python guard.py COMMAND...        standard input: a pipe whose other end the owner holds

The command runs in a process group of its own. The whole group is ended when the pipe closes (the owner closed it, or
was killed), when the guard gets SIGTERM or SIGINT, and when the command itself ends: vLLM's engine processes would
outlive a server that was killed. The exit status is the command's. Standard library only, so that it starts at once.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""


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


def main(command: list[str]) -> int:
    """Run the command; returns its exit status, 128 + n for signal n."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Event()

    def end(*_: object) -> None:
        if not ending.is_set():
            ending.set()
            threading.Thread(target=_end_group, args=(child.pid, GRACE_S)).start()

    def watch_owner() -> None:
        while os.read(0, 1):
            pass
        end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    threading.Thread(target=watch_owner, daemon=True).start()
    status = child.wait()
    _end_group(child.pid, GRACE_S if ending.is_set() else 0.0)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the thread that reads the pipe may still wait
