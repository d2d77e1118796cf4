# SPDX-License-Identifier: Apache-2.0
"""Tasks on the workers of a Ray cluster, as data/pool.py runs them in processes of one machine.

A worker is an actor with one CPU and, on GPUs, one GPU, on any node that has them free. If it dies, or its node does,
its task goes to another, `TRIES` times at most, and a new one is started where there is room: work goes on without it
until then. Ray's own pools do neither: Ray Data starts workers and tasks again without end, and waits for a worker
whose node will not come back; `ray.util.ActorPool` hands tasks to actors that are dead.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from embedrl_verl.errors import ConfigError, ResourceError
from embedrl_verl.platforms.cluster import Cluster, check_home, refuse_silent, variables_of

logger = logging.getLogger(__name__)

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

TRIES = 3
"""Workers that may die of one task, and in a row before any has started."""
LOOK_S = 60.0
"""How often it is said that no worker has found room."""
_ALONE = {"address": "local", "include_dashboard": False}


@dataclass(frozen=True)
class RayTasks:
    """Runs tasks; made by `joined`.

    Attributes:
        workers: at a time, at most.
        device: that a worker computes on, as PyTorch names it.
        must_see: absolute paths that every node has.
    """

    workers: int
    device: str
    must_see: Sequence[Path]

    def request(self) -> dict[str, int]:
        """What Ray is asked for, a worker."""
        return {"num_cpus": 1, "num_gpus": int(self.device == "cuda")}

    def run(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterator[Task], workers: int
    ) -> Iterator[Result]:
        """As `data.pool.run_tasks`, which see.

        Raises:
            ConfigError: a node does not have what it must see. ResourceError: no node has room for a worker, or workers
                die. What `function` raises.
        """
        kind = ray.remote(_Worker).options(**self.request(), max_restarts=0)
        running: dict[Any, tuple[Any, Task | None]] = {}  # reference -> the worker, and its task; None: it starts
        back: deque[Task] = deque()
        deaths: Counter[int] = Counter()  # by the identity of the task; of None: before a worker has started

        def start() -> None:
            worker = kind.remote(function, shared)
            running[worker.check.remote(self.must_see)] = worker, None

        try:
            for _ in range(workers):
                start()
            while running:
                done, _ = ray.wait(list(running), timeout=LOOK_S)
                if not done and all(task is None for _, task in running.values()):
                    self._wait_for_room()
                for reference in done:
                    worker, task = running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except RayTaskError as error:
                        raise error.cause from error
                    except RayError as error:
                        ray.kill(worker)  # one that is only out of reach may not go on beside another
                        _count_death(deaths, task, error)
                        if task is not None:
                            back.append(task)
                        start()
                        continue
                    if task is not None:
                        yield result
                    deaths.pop(id(task), None)
                    following = back.popleft() if back else next(tasks, None)
                    if following is None:
                        ray.kill(worker)
                    else:
                        running[worker.run.remote(following)] = worker, following
                if not back and all(task is None for _, task in running.values()):
                    # Nothing is under way: workers that start are only needed if there is more to do.
                    if (following := next(tasks, None)) is None:
                        return
                    back.append(following)
        finally:
            for worker, _ in running.values() if ray.is_initialized() else ():  # else they have ended with the cluster
                ray.kill(worker)

    def _wait_for_room(self) -> None:
        if not room(self.device):
            raise ResourceError(_too_small(self.device))
        logger.warning("no worker has found room yet: the cluster is busy, or a node is slow to start one")


class _Worker:
    """The actor."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any) -> None:
        self._function, self._shared = function, shared

    def check(self, must_see: Sequence[Path]) -> None:
        for path in must_see:
            if not path.exists():
                raise ConfigError(
                    f"every node must have {path}, as on a disk that all share; {socket.gethostname()} has not. Put "
                    "input, output and models there"
                )

    def run(self, task: Any) -> Any:
        return self._function(self._shared, task)


def _count_death(deaths: Counter[int], task: object, error: RayError) -> None:
    deaths[id(task)] += 1
    logger.warning("a worker is gone: %s", str(error).splitlines()[0])
    if deaths[id(task)] >= TRIES:
        what = "before they had started" if task is None else "of one task"
        raise ResourceError(
            f"{TRIES} workers have died {what}, most likely for want of memory. Finished parts are kept: mend the "
            f"cause and run the same command again. The last: {error}"
        ) from error


@contextmanager
def joined(cluster: Cluster, device: str, must_see: Sequence[Path], names: Collection[str] = ()) -> Iterator[RayTasks]:
    """Connect to the cluster, or start one on this machine; within it tasks can be run.

    Args:
        device: "auto": GPUs if the cluster has any.
        names: variables of this process that workers need, beside the usual ones.
    """
    if device.startswith("cuda:"):
        raise ConfigError(f"workers are given their GPUs by Ray: --device must be cuda, cpu or auto; got {device}")
    check_home()
    if cluster.address not in (None, "auto"):
        refuse_silent(str(cluster.address))
    options: dict[str, Any] = {"address": cluster.address} if cluster.address else _ALONE
    try:
        ray.init(**options, runtime_env={"env_vars": variables_of(names)})
    except ConnectionError as error:
        raise ResourceError(f"--ray {cluster.address} must name a Ray cluster that answers; got: {error}") from error
    try:
        if device == "auto":
            device = "cuda" if room("cuda") else "cpu"
        slots = room(device)
        if not slots:
            raise ResourceError(_too_small(device))
        default = slots if device == "cuda" else len(_alive())
        yield RayTasks(cluster.workers or default, device, [Path(os.path.abspath(one)) for one in must_see])
    finally:
        ray.shutdown()


def room(device: str) -> int:
    """Workers that the nodes of the cluster that is joined would hold if they were free."""
    each = [[node["Resources"].get(name, 0) for name in ("CPU", "GPU")] for node in _alive()]
    return sum(int(min(cpus, gpus) if device == "cuda" else cpus) for cpus, gpus in each)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _too_small(device: str) -> str:
    needs = "a CPU and a GPU" if device == "cuda" else "a CPU"
    found = ", ".join(str({k: v for k, v in one["Resources"].items() if k in ("CPU", "GPU")}) for one in _alive())
    return f"a worker needs a Ray node with {needs} (--device {device}); the nodes have {found or 'nothing'}"
