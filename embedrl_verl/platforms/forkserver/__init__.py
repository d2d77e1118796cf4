# SPDX-License-Identifier: Apache-2.0
"""Processes that are forked from one interpreter, in place of ten that import the same.

Without a GPU a run starts some ten processes on a few cores, and each imports torch, transformers, vLLM and verl for
10 to 15 seconds. A fork server imports them once. It has a single thread and has run imports only, so a fork of it is
what a new interpreter would be after the same imports. `ForkServer.python` stands in for the interpreter; Ray starts
its workers by it (`runtime_env.py_executable`).

For the platform `cpu` and a Ray cluster that the run starts itself. CUDA cannot be used in a forked process whose
parent has used it, and on a node with many cores the imports run side by side.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from embedrl_verl.platforms.cluster import joins_a_cluster
from embedrl_verl.platforms.compat import RAY_VERSION
from embedrl_verl.platforms.forkserver import client, server
from embedrl_verl.platforms.forkserver.server import PYTHON

logger = logging.getLogger(__name__)

LONGEST_FOLDER = 79  # a socket's address has at most 107 characters
MODULES = (
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1",
    "verl.workers.engine_workers",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "embedrl_verl.platforms.training_worker",
    "embedrl_verl.embedder.worker",
    "embedrl_verl.trainer.agent_loop",
    "ray._private.workers.default_worker",
)
"""What the processes of a run import."""
_ENVIRONMENT = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # the one thread that these imports would start
    "RAY_JOB_ID": "01000000",  # of the first job of every local cluster; Ray reads it when it is imported
}


class ForkServer:
    """A server that imports `modules` and forks until it is closed or this process ends.

    Args:
        environment: of the server. Processes whose variables of `server.READ_AT_IMPORT` differ are not forked.
        modules: imported in the background; who asks earlier waits.
        on_demand: import when somebody asks for the first process.
    """

    def __init__(
        self, environment: Mapping[str, str], modules: Sequence[str] = MODULES, *, on_demand: bool = False
    ) -> None:
        place = tempfile.gettempdir()
        self._folder = tempfile.mkdtemp(prefix="embedrl-fork-", dir=place if len(place) < LONGEST_FOLDER else "/tmp")
        address, self._log = f"{self._folder}/socket", Path(self._folder) / "log"
        self.python = f"{self._folder}/python"
        command = shlex.join([sys.executable, "-SE", client.__file__, address])
        Path(self.python).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        os.chmod(self.python, 0o700)
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(address)
            listener.listen(64)
            when = "on demand" if on_demand else "now"
            self._process = subprocess.Popen(
                [sys.executable, server.__file__, str(listener.fileno()), when, *modules],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env={**environment, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C in a terminal reaches the owner alone
            )

    def close(self) -> None:
        """Kill what was forked and still runs, and end the server. Warns of one that had ended by itself."""
        if self._process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-1000:].strip()
            logger.warning("the fork server has ended with status %s: %s", self._process.returncode, tail)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()  # at once while it imports
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def python() -> str:
    """The stand-in for the interpreter where a fork server is up, else the interpreter."""
    return os.environ.get(PYTHON) or sys.executable


@contextlib.contextmanager
def fork_server(modules: Sequence[str] = MODULES) -> Iterator[None]:
    """Within it, a server is up on the platform `cpu`, unless `PYTHON` names one or is set and empty.

    Enter it before anything else: it imports beside this process.
    """
    if os.environ.get("VERL_PLATFORM") != "cpu" or PYTHON in os.environ:
        yield
        return
    if importlib.metadata.version("ray").split(".")[:2] != RAY_VERSION.split("."):
        logger.warning("no fork server: it is for Ray %s; every process imports for itself", RAY_VERSION)
        yield
        return
    started = ForkServer(os.environ, modules)
    os.environ[PYTHON] = started.python
    try:
        yield
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # its workers end in order
        del os.environ[PYTHON]
        started.close()


def fork_ray_workers(config: Any) -> None:
    """Let Ray start its workers by the server that `PYTHON` names, in a cluster that the run starts itself."""
    ray_init = config.ray_kwargs.ray_init
    runtime_env = ray_init.get("runtime_env") or {}
    if os.environ.get(PYTHON) and not joins_a_cluster(config) and not runtime_env.get("py_executable"):
        with open_dict(ray_init):
            ray_init.runtime_env = {**runtime_env, "py_executable": shlex.quote(os.environ[PYTHON])}
