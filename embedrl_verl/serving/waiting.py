# SPDX-License-Identifier: Apache-2.0
"""Waiting with a limit of time, safe to cancel on every supported Python.

`asyncio.wait_for` may swallow a cancellation before Python 3.12, and `asyncio.timeout` came with 3.11.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """A semaphore of `limit` slots, handed on in the order of asking. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self, timeout: float | None) -> bool:
        """Take a slot, waiting at most `timeout` seconds (None: for ever). False: there was none in time."""
        if self._free > 0:
            self._free -= 1
            return True
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait((turn,), timeout=timeout)
        except asyncio.CancelledError:
            if turn.done():
                self.release()
            raise
        finally:
            turn.cancel()  # no effect on one that was given a slot
        return not turn.cancelled()

    def release(self) -> None:
        """Give a slot back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Signal:
    """Wakes those who wait at the moment it is fired; later ones wait for the next time. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds (None: for ever). False: it was not fired in time."""
        fired = asyncio.get_running_loop().create_future()
        self._waiting.add(fired)
        try:
            await asyncio.wait((fired,), timeout=timeout)
        finally:
            self._waiting.discard(fired)
            fired.cancel()
        return not fired.cancelled()

    def fire(self) -> None:
        """Wake everybody who waits."""
        for fired in self._waiting:
            if not fired.done():
                fired.set_result(None)
