# SPDX-License-Identifier: Apache-2.0
"""Kills the process that embeds in step 2 of a run, and holds the step's reward stage until it is back."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from embedrl_verl.embedder.served import guard
from embedrl_verl.progress import read_metrics

REWARD = """
import pathlib, time
from embedrl_verl.rewards.functions import {function}

def compute_score(batch):
    until = time.monotonic() + 400
    while pathlib.Path({hold!r}).exists() and time.monotonic() < until:
        pathlib.Path({reached!r}).touch()
        time.sleep(0.1)
    return {function}.compute_score(batch)
"""


def ours() -> list[psutil.Process]:
    """Every process that the run has started."""
    return psutil.Process().children(recursive=True)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def ends(process: psutil.Process, *, within_s: float) -> bool:
    """Whether it ends: Ray tells its processes to and waits for none, and a big one gives its pages back slowly."""
    until = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
    return True


def server() -> psutil.Process | None:
    """vLLM's API server: the child of its inner guard."""
    inner = [one for one in ours() if guard.__file__ in words(one) and guard.INNER in words(one)]
    return next((child for one in inner for child in one.children()), None)


def actor(name: str) -> psutil.Process | None:
    return next((one for one in ours() if "".join(words(one)[:1]).startswith(f"ray::{name}")), None)


def sentence_actor() -> psutil.Process | None:
    return actor("_SentenceActor")


@contextlib.contextmanager
def owner_held() -> Iterator[None]:
    """Nobody starts the server again meanwhile."""
    owner = actor("_ServerActor")
    assert owner is not None
    owner.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            owner.resume()


def answer(process: psutil.Process, path: str) -> str:
    """What the server says; "" if it does not."""
    command = words(process)
    where = {name: command[command.index(name) + 1] for name in ("--host", "--port") if name in command}
    try:
        with urllib.request.urlopen(f"http://{where['--host']}:{where['--port']}{path}", timeout=5) as response:
            return response.read().decode() or "yes"
    except (OSError, http.client.HTTPException, KeyError):
        return ""


def answered(process: psutil.Process) -> float:
    """Rows that the server has embedded."""
    lines = [line for line in answer(process, "/metrics").splitlines() if line.startswith("http_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if '"/v1/embeddings"' in line and '"2xx"' in line)


def worked(process: psutil.Process) -> float:
    """Tenths of seconds that a process has computed: a few rows."""
    return process.cpu_times().user // 0.1


class Killer(threading.Thread):
    """Kills what `find` finds in step 2, when `done` of it has grown by `after`; `happened` says what was done. What
    `meanwhile` holds, it holds from the kill to the reward stage."""

    def __init__(
        self,
        folder: Path,
        find: Callable[[], psutil.Process | None],
        done: Callable[[psutil.Process], float],
        is_up: Callable[[psutil.Process], Any],
        *,
        after: int,
        meanwhile: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        function: str = "no_judge",
    ) -> None:
        super().__init__(daemon=True)
        self._after, self._meanwhile = after, meanwhile
        self._folder, self._find, self._done, self._is_up = folder, find, done, is_up
        self._hold, self._reached = folder / "hold", folder / "reached"
        self.happened: list[str] = []
        self.started: psutil.Process | None = None
        self.over = threading.Event()
        folder.mkdir(exist_ok=True)
        (folder / "reward.py").write_text(
            REWARD.format(function=function, hold=str(self._hold), reached=str(self._reached))
        )
        self.overrides = [f"reward.custom_reward_function.path={folder / 'reward.py'}"]

    def _wait(self, condition: Callable[[], Any], pause_s: float) -> bool:
        while not self.over.is_set():
            if condition():
                return True
            time.sleep(pause_s)
        return False

    def _is_back(self, killed: int) -> bool:
        self.started = self._find()
        return self.started is not None and self.started.pid != killed and bool(self._is_up(self.started))

    def run(self) -> None:
        metrics = self._folder / "metrics.jsonl"
        if not self._wait(lambda: metrics.exists() and 1 in read_metrics(metrics), 0.1):
            return
        process = self._find()
        assert process is not None
        if not self._wait(lambda: self._is_up(process), 0.05):  # one that does not answer has no count
            return
        before = self._done(process)
        if not self._wait(lambda: self._done(process) >= before + self._after, 0.05):
            return
        with self._meanwhile():
            self._hold.touch()
            os.kill(process.pid, signal.SIGKILL)
            self.happened.append("killed")
            self._wait(self._reached.exists, 0.1)
        if self._wait(lambda: self._is_back(process.pid), 0.5):
            self.happened.append("back")
        self._hold.unlink()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            self.happened.append("what it had started is left")
