# SPDX-License-Identifier: Apache-2.0
"""Embedding servers that a run starts: child processes, watched, started again if they die or hang, ended with the run.

In a run each has a Ray actor that holds its devices and starts it on the actor's node; actors end with the trainer, and
servers with their actors, also when these are killed (`guard`).
"""

from __future__ import annotations

import http.client
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served import guard
from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command
from embedrl_verl.errors import EmbedderError, ResourceError
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.platforms.ports import free_port

logger = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW_S = 5, 1800.0
"""A server that dies more often than this within the window is given up."""
HANG_S = 180.0
"""A server that was up and does not answer /health for so long is started anew."""
LOOK_S = 1.0
PROBE_S = 10.0
TAIL_LINES = 25
PLACED_WITHIN_S = 60.0
STATE_WITHIN_S = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server is never behind a proxy


class ServerProcess:
    """One server, owned by this process; a thread watches it. `failure` says why it was given up.

    Args:
        command, environment: of the child.
        url: where it will answer.
        log: file for its output; every start appends.
        startup_s: seconds from a start until /health must answer.
        hang_s: see `HANG_S`.
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
    ) -> None:
        self.url, self.log = url, log
        self.restarts = 0
        self.failure: str | None = None
        self._command = [sys.executable, "-I", guard.__file__, *command]
        self._environment, self._startup_s, self._hang_s = dict(environment), startup_s, hang_s
        self._starts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        self._settled, self._stopping = threading.Event(), threading.Event()  # settled: it was up once, or has failed
        self._child = self._start()
        self._watcher = threading.Thread(target=self._watch, name=f"watch {url}", daemon=True)
        self._watcher.start()

    def wait_ready(self) -> None:
        """Block until it answers."""
        self._settled.wait()
        if self.failure is not None:
            raise EmbedderError(self.failure)

    def stop(self) -> None:
        """End it and wait until it and what it started are gone."""
        self._stopping.set()
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
            while (cause := self._live()) is not None:
                self._end()
                recent = sum(time.monotonic() - start < RESTART_WINDOW_S for start in self._starts)
                often = recent > MAX_RESTARTS
                if often or not self._settled.is_set():  # the log of one that was never up says what is wrong
                    self._give_up(f"{cause}, {MAX_RESTARTS} restarts did not help" if often else cause)
                    return
                self.restarts += 1
                logger.warning("embedding server %s %s; starting it again. Its log: %s", self.url, cause, self.log)
                if self._stopping.wait(2.0**recent - 2.0):
                    return
                self._child = self._start()
        except OSError as error:
            self._give_up(f"cannot be started: {error}")

    def _live(self) -> str | None:
        """Watch it from a start to its end; what ended it, None if `stop` does."""
        last_answer = last_probe = time.monotonic()
        was_up = False
        while not self._stopping.wait(LOOK_S):
            if (code := self._child.poll()) is not None:
                return f"ended with status {code}"
            if not was_up or time.monotonic() >= last_probe + PROBE_S:
                last_probe = time.monotonic()
                if self._answers():
                    last_answer, was_up = time.monotonic(), True
                    self._settled.set()
            silent = time.monotonic() - last_answer
            if was_up and silent > self._hang_s:
                return f"did not answer for {silent:.0f} s"
            if not was_up and silent > self._startup_s:
                return f"did not answer within {self._startup_s:.0f} s of its start (embedrl.embedder.server.startup_s)"
        return None

    def _give_up(self, cause: str) -> None:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        tail = "\n".join(lines[-TAIL_LINES:]) or "(empty)"
        self.failure = f"the embedding server {self.url} {cause}. The end of its log {self.log}:\n{tail}"
        self._settled.set()

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/health", timeout=PROBE_S) as response:
                return bool(response.status < 500)
        except (http.client.HTTPException, OSError):  # another program may have taken the port
            return False


class _ServerActor:
    """Owns one server; lives on the node and devices on which the server runs."""

    def __init__(self, index: int, arguments: list[str], template: str, on_cpu: bool, startup_s: float) -> None:
        folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / f"embedding_server_{index}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat_template.jinja"
        file.write_text(template, encoding="utf-8")
        host, environment = ray.util.get_node_ip_address(), dict(os.environ)
        if not on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))
        port = free_port(host)
        command = server_command(arguments, file, host=host, port=port, python=python())
        self._process = ServerProcess(
            command, environment, f"http://{host}:{port}", folder / "server.log", startup_s=startup_s
        )

    def url(self) -> str:
        return self._process.url

    def wait_ready(self) -> None:
        self._process.wait_ready()

    def state(self) -> tuple[int, str | None]:
        return self._process.restarts, self._process.failure


class ServerFleet:
    """Starts the servers of the section `embedrl.embedder` at once; `urls` answer after `wait_ready`."""

    def __init__(self, config: EmbedderConfig, processor: EmbedProcessor, *, on_cpu: bool) -> None:
        server = config.server
        gpus = server.n_gpus_per_server
        group = _placed([{"CPU": 1.0, **({"GPU": float(gpus)} if gpus else {})}] * server.servers)
        arguments, template = server_arguments(config, processor, on_cpu=on_cpu), prompt_template(processor)
        actor = ray.remote(_ServerActor)
        self._actors = [
            actor.options(
                num_cpus=1,
                num_gpus=gpus,
                max_concurrency=4,  # questions while one waits
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            ).remote(i, arguments, template, on_cpu, server.startup_s)
            for i in range(server.servers)
        ]
        self._restarts = [0] * server.servers
        self.urls: list[str] = ray.get([one.url.remote() for one in self._actors])

    def wait_ready(self) -> None:
        """Block until all servers answer."""
        ray.get([one.wait_ready.remote() for one in self._actors])

    def states(self) -> list[tuple[int, str | None]]:
        """Of each server: restarts so far, and why it was given up (or None). Never raises: one lost node is no reason
        to end a run whose rows other servers embed."""
        asked = [one.state.remote() for one in self._actors]
        return [self._state(answer, place) for place, answer in enumerate(asked)]

    def _state(self, answer: Any, place: int) -> tuple[int, str | None]:
        try:
            self._restarts[place], failure = ray.get(answer, timeout=STATE_WITHIN_S)
        except ray.exceptions.GetTimeoutError:
            failure = f"its process says nothing within {STATE_WITHIN_S:.0f} s"
        except ray.exceptions.RayError as error:
            failure = f"its process is lost ({type(error).__name__}), and nobody starts the server again"
        return self._restarts[place], failure


def _placed(bundles: list[dict[str, float]]) -> PlacementGroup:
    """A placement group with these bundles (a server's devices are on one node)."""
    group = placement_group(bundles, strategy="PACK", name="embedding_servers")
    if not group.wait(PLACED_WITHIN_S):
        remove_placement_group(group)
        free = ray.available_resources()
        raise ResourceError(
            f"{len(bundles)} embedding servers ask for {bundles[0]} each (embedrl.embedder.server.servers and "
            f"n_gpus_per_server), and Ray did not place them within {PLACED_WITHIN_S:.0f} s: "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are left beside the run's other processes. "
            "Lower them, or add devices"
        )
    return group
