# SPDX-License-Identifier: Apache-2.0
"""Decoding in threads. A module of its own, since pages are made without torch and training data are not."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def default_threads() -> int:
    """Threads for decoding: one a core, 16 at most."""
    return min(16, os.cpu_count() or 1)


def in_threads(
    function: Callable[[_In], _Out],
    inputs: Iterable[_In],
    threads: int,
    is_light: Callable[[_In], bool] = lambda one: False,
) -> Iterator[_Out]:
    """`map` in threads, in order, that reads only a few inputs ahead of what was asked for. What `is_light` is done in
    this thread: a change of threads would take longer."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[_Out]] = deque()
        for one in inputs:
            if is_light(one):
                done: Future[_Out] = Future()
                done.set_result(function(one))
                running.append(done)
            else:
                running.append(pool.submit(function, one))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
