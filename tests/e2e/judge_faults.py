# SPDX-License-Identifier: Apache-2.0
"""What befalls the judge of a run, step by step: a thread that watches the run's log and its judge's requests."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from embedrl_verl.platforms.ports import free_port
from embedrl_verl.progress import read_metrics

LIMIT = 4
"""Requests that a run sends at once: `embedrl.judge.limit`."""


class FaultyJudge:
    """Step 1: well. Step 2: killed after its first answers. Step 3: started again, then stopped like a machine that
    hangs. Step 4: goes on, but answers no number. Step 5: well again.

    A judge of its own process; `happened` says which faults were really made, so that a test cannot pass without them.
    With `faults=False` it is well in every step.
    """

    def __init__(self, folder: Path, metrics: Path, *, faults: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._metrics = folder, metrics
        self.port = free_port()
        self.happened: list[str] = []
        self._over = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch if faults else self._over.wait, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("judge_server.py")
        return subprocess.Popen([sys.executable, str(script), str(self.port), str(self._folder)])

    def _answered(self) -> int:
        count = self._folder / "requests"
        return count.stat().st_size if count.exists() else 0

    def _wait(self, condition) -> bool:
        while not self._over.is_set():
            if condition():
                return True
            time.sleep(0.01)
        return False

    def _step_is_logged(self, step: int) -> bool:
        return self._metrics.exists() and step in read_metrics(self._metrics)

    def _watch(self) -> None:
        if not self._wait(lambda: self._step_is_logged(1)):
            return
        before = self._answered()
        if not self._wait(lambda: self._answered() > before + LIMIT):  # so one of the first has been taken
            return
        self._process.kill()
        self.happened.append("killed")
        if not self._wait(lambda: self._step_is_logged(2)):
            return
        self._process.wait()
        self._process = self._start()
        before = self._answered()
        if not self._wait(lambda: self._answered() > before + LIMIT):
            return
        self._process.send_signal(signal.SIGSTOP)
        self.happened.append("stopped")
        if not self._wait(lambda: self._step_is_logged(3)):
            return
        (self._folder / "garbage").touch()
        self._process.send_signal(signal.SIGCONT)
        self.happened.append("garbage")
        if self._wait(lambda: self._step_is_logged(4)):
            (self._folder / "garbage").unlink()
            self.happened.append("well")
