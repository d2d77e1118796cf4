# SPDX-License-Identifier: Apache-2.0
"""Worker processes that end when the process that started them ends, also if that is killed.

Tasks are handed out a few at a time, so that a long list of them is never in memory. One worker is no process at all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any, TypeAlias, TypeVar

from embedrl_verl.errors import ConfigError, ResourceError

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

RunTasks: TypeAlias = Callable[[Callable[..., Any], Any, Iterator[Any], int], Iterator[Any]]
"""`run_tasks`, or what does the same elsewhere."""

_shared: Any = None
AHEAD = 2
"""Tasks a worker that are handed out before they are needed."""


def worker_count(named: int | None) -> int:
    """The number of processes that a user named, or the CPUs that this process may use."""
    if named is not None and named < 1:
        raise ConfigError(f"workers must be at least 1; got {named}")
    return named or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_tasks(
    function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterator[Task], workers: int
) -> Iterator[Result]:
    """`function(shared, task)` of every task, in the order in which they finish.

    Args:
        function, shared, tasks: can be pickled. `shared` is sent once a worker.

    Raises:
        ResourceError: a worker was killed (out of memory, most likely).
        What `function` raises; the other workers are stopped.
    """
    if workers == 1:
        for task in tasks:
            yield function(shared, task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(shared,))
    running: set[Future[Result]] = set()
    try:
        while True:
            for task in tasks:
                running.add(pool.submit(_run, function, task))
                if len(running) >= AHEAD * workers:
                    break
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a worker process was killed, most likely for want of memory. Finished parts are kept: run the same "
            "command again to go on, with fewer --workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)
        if running:  # stopped early: what is being made is not wanted
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=True)


def _run(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_shared, task)


def _start_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True, name="watch-parent").start()


def _end_with(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)
