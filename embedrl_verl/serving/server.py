# SPDX-License-Identifier: Apache-2.0
"""One server of a pool: what is known of its health, and how one try of a request went."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

# Longest excerpt of a server's message in an error.
_EXCERPT = 300
RETRIED = (408, 425, 429)
"""They say "send it again": time-out, too early, too many."""


class TryFailed(Exception):
    """One try failed. `retry`: another may succeed. `down`: the server cannot be reached, or does not answer."""

    def __init__(
        self, cause: str, detail: str, *, retry: bool = True, down: bool = False, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.cause = cause
        self.retry = retry
        self.down = down
        self.status = status


@dataclass
class Server:
    """State of one server; outlives event loops.

    `ready_at`: monotonic time before which it asked not to be called. `revival` counts its recoveries, so that a
    request sent before one does not take it down after it. `turn` is a running number of its last use.
    """

    url: str
    up: bool = True
    in_flight: int = 0
    requests: int = 0
    ready_at: float = 0.0
    revival: int = 0
    turn: int = 0
    last_error: str = ""

    async def send(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        payload: Mapping[str, Any] | bytes | None,
        timeout_s: float,
    ) -> Any:
        """One try: the decoded JSON answer (None for an empty body).

        Raises:
            TryFailed: with cause "timeout", "connection refused", "cannot connect", "connection lost", "HTTP <status>"
                or "not JSON".
        """
        body = json.dumps(payload).encode() if isinstance(payload, Mapping) else payload
        status, raw, retry_after = await self._exchange(session, method, path, body, timeout_s)
        if status >= 400:
            if retry_after is not None:
                self.ready_at = max(self.ready_at, time.monotonic() + seconds_to_wait(retry_after, timeout_s))
            retry = status >= 500 or status in RETRIED
            raise TryFailed(f"HTTP {status}", _message(raw), retry=retry, status=status)
        if not raw:
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            raise TryFailed("not JSON", f"HTTP {status} with {_message(raw)}", status=status) from error

    async def probe(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        """GET /health. A server without that route answers too, which is enough.

        Raises:
            TryFailed: as `send`; with cause "timeout" the server may only be busy.
        """
        status, raw, _ = await self._exchange(session, "GET", "/health", None, timeout_s)
        if status >= 500:
            raise TryFailed(f"HTTP {status}", f"GET /health: {_message(raw)}", down=True, status=status)

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> tuple[int, bytes, str | None]:
        """Status, body and Retry-After.

        aiohttp's own time limit takes a cancellation that comes at the same moment for its own and drops it.
        """
        talk = asyncio.get_running_loop().create_task(self._talk(session, method, path, body))
        talk.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to read it
        try:
            await asyncio.wait((talk,), timeout=timeout_s)
            if not talk.done():
                raise TryFailed("timeout", f"no answer within {timeout_s:.3g} s", down=True)
            return talk.result()
        finally:
            talk.cancel()

    async def _talk(
        self, session: aiohttp.ClientSession, method: str, path: str, body: bytes | None
    ) -> tuple[int, bytes, str | None]:
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            async with session.request(method, self.url + path, data=body, headers=headers) as response:
                return response.status, await response.read(), response.headers.get("Retry-After")
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            cause = "connection refused" if refused else "cannot connect"
            raise TryFailed(cause, str(error), down=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise TryFailed("connection lost", str(error) or type(error).__name__, down=True) from error


def seconds_to_wait(retry_after: str, longest: float) -> float:
    """Seconds that a Retry-After header (a number, or a date) asks for, in [0, longest]; 0 if it is neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), longest) if seconds == seconds else 0.0


def _message(raw: bytes) -> str:
    """A server's own words: {"error": {"message": ...}} as OpenAI-style servers write it, or the start of the body."""
    text = raw[: 16 * _EXCERPT].decode(errors="replace").strip()
    try:
        error = json.loads(text).get("error")
        text = str(error.get("message", text)) if isinstance(error, dict) else text
    except (ValueError, AttributeError):
        pass
    return repr(text[:_EXCERPT])
