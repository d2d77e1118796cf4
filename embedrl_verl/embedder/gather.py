# SPDX-License-Identifier: Apache-2.0
"""Calls that come one by one, carried out together: what arrives while one call is under way goes into the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gatherer(Generic[T, R]):
    """`await gatherer(item)` is the item's result, or raises it if it is an exception.

    Args:
        run: the results of several items; what it raises goes to those who wait for them, and the next call is tried.
        kind: items of different kinds are not carried out together.
        most: items of one call.
        at_once: calls under way.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        *,
        kind: Callable[[T], Hashable] = lambda item: None,
        most: int | None = None,
        at_once: int = 1,
    ) -> None:
        self._run, self._kind, self._most, self._free = run, kind, most, at_once
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, item: T) -> R:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _work(self) -> None:
        try:
            await self._until_none_waits()
        finally:  # also when the event loop ends: another may follow
            self._free += 1

    async def _until_none_waits(self) -> None:
        while True:
            self._waiting = [one for one in self._waiting if not one[1].done()]  # nobody waits for cancelled ones
            if not self._waiting:
                return
            kind = self._kind(self._waiting[0][0])
            alike = [place for place, (item, _) in enumerate(self._waiting) if self._kind(item) == kind]
            taken = set(alike[: self._most])
            batch = [self._waiting[place] for place in sorted(taken)]
            self._waiting = [one for place, one in enumerate(self._waiting) if place not in taken]
            results: Sequence[R | Exception]
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():  # its call was cancelled
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
