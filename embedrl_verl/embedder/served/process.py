# SPDX-License-Identifier: Apache-2.0
"""A server as a child process: started, waited for, watched, restarted when it dies or hangs, ended with its owner."""

from __future__ import annotations

import http.client
import logging
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedrl_verl.embedder.served import guard
from embedrl_verl.errors import EmbedderError

logger = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW_S = 5, 1800.0
"""A server that dies more often than this within the window is given up."""
HANG_S = 180.0
"""A server that was up and does not answer /health for so long is started anew."""
LOOK_S = 1.0
PROBE_S = 10.0
TAIL_LINES = 25
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server is never behind a proxy


class ServerProcess:
    """One server, owned by this process.

    Args:
        command: the command line.
        environment: of the child.
        url: where it will answer.
        log: file for its output; every start appends.
        startup_s: seconds from a start until /health must answer.
        hang_s: see `HANG_S`.
        name: what it is called in messages.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        url: str,
        log: Path,
        *,
        startup_s: float,
        hang_s: float = HANG_S,
        name: str = "embedding server",
    ) -> None:
        self.url, self.log, self._name = url, log, name
        self._command = [sys.executable, "-I", guard.__file__, *command]
        self._environment, self._startup_s, self._hang_s = dict(environment), startup_s, hang_s
        self._starts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        self._changed = threading.Condition()
        self._ready, self._stopping = False, False
        self._failure: str | None = None
        self.restarts = 0
        self._child = self._start()
        self._watcher = threading.Thread(target=self._watch, name=f"watch {url}", daemon=True)
        self._watcher.start()

    @property
    def failure(self) -> str | None:
        """Why the server was given up, or None."""
        return self._failure

    def wait_ready(self) -> None:
        """Block until it answers.

        Raises:
            EmbedderError: it died or did not answer in time; with the end of its log.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure is not None)
            if self._failure is not None:
                raise EmbedderError(self._failure)

    def stop(self) -> None:
        """End it and wait until it and what it started are gone."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._watcher.join()  # it may be starting the server again
        self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts.append(time.monotonic())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal reaches the owner alone
            )

    def _end(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def _watch(self) -> None:
        try:
            self._keep_up()
        except OSError as error:  # it could not be started again
            self._set(failure=f"the {self._name} {self.url} cannot be started: {error}. Its log: {self.log}")

    def _keep_up(self) -> None:
        last_answer, next_probe = time.monotonic(), 0.0
        was_up = False  # since its last start
        while not self._stopping and self._failure is None:
            now = time.monotonic()
            code = self._child.poll()
            if code is None and now >= next_probe:
                if self._answers():
                    last_answer, was_up = time.monotonic(), True
                    self._set(ready=True)
                next_probe = time.monotonic() + (PROBE_S if was_up else LOOK_S)
            silent = time.monotonic() - last_answer
            cause = None
            if code is not None:
                cause = f"ended with status {code}"
            elif was_up and silent > self._hang_s:
                cause = f"did not answer for {silent:.0f} s"
            elif not was_up and silent > self._startup_s:
                cause = (
                    f"did not answer within {self._startup_s:.0f} s of its start (embedrl.embedder.server.startup_s)"
                )
            if cause is not None and not self._stopping:
                self._restart_or_give_up(cause, was_up)
                last_answer, next_probe, was_up = time.monotonic(), 0.0, False
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, timeout=LOOK_S)

    def _restart_or_give_up(self, cause: str, was_up: bool) -> None:
        """One that has never been up is not tried again: its log says what is wrong."""
        self._end()
        recent = sum(time.monotonic() - start < RESTART_WINDOW_S for start in self._starts)
        too_often = recent > MAX_RESTARTS
        if not (was_up or self._ready) or too_often:
            often = f", {MAX_RESTARTS} restarts within {RESTART_WINDOW_S:.0f} s did not help" if too_often else ""
            self._set(
                failure=f"the {self._name} {self.url} {cause}{often}. The end of its log {self.log}:\n{self.tail()}"
            )
            return
        self.restarts += 1
        logger.warning("the %s %s %s; starting it again. Its log: %s", self._name, self.url, cause, self.log)
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, timeout=2.0**recent - 2.0)
        if not self._stopping:
            self._child = self._start()

    def _set(self, *, ready: bool = False, failure: str | None = None) -> None:
        with self._changed:
            self._ready = self._ready or ready
            self._failure = failure
            self._changed.notify_all()

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/health", timeout=PROBE_S) as response:
                return bool(response.status < 500)
        except (http.client.HTTPException, OSError):  # another program may have taken the port
            return False

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return "\n".join(lines[-TAIL_LINES:]) or "(empty)"
