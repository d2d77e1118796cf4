# SPDX-License-Identifier: Apache-2.0
"""Several OpenAI-style HTTP servers behind one asynchronous client.

    pool = ServerPool(["http://a:8000", "http://b:8000"], PoolSettings(limit=64))
    async with pool:
        answer = await pool.post("/v1/chat/completions", {...}, deadline=time.monotonic() + 60)

A request goes to the server with the fewest requests in flight among those that are up; one with a home goes there
unless that server has `HOME_SLACK` more in flight than the least busy one. A server that cannot be
reached or does not answer in time is down until a probe of its /health succeeds. What fails is tried again, on another
server if there is one; a request that fails for good raises, there is no default answer.

Sessions, slots and probes belong to an event loop, and end with it; what is known of the servers stays. One loop uses a
pool at a time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.serving.errors import ServerError
from embedrl_verl.serving.server import Server, TryFailed
from embedrl_verl.serving.stats import PoolStats, ServerStats
from embedrl_verl.serving.urls import server_url
from embedrl_verl.serving.waiting import Signal, Slots

_LOG = logging.getLogger(__name__)
HOME_SLACK = 16
"""Requests that a server may have above the least busy one and still get those whose home it is."""
_LONGEST_BACKOFF_S = 10.0
_PROBE_TIMEOUT_S = 5.0
_LOOK_FOR_S = 1.0
"""Seconds between probes of a server that is gone: rows wait for it, and to be refused costs nothing."""
# Below uvicorn's 5 s, so that an idle connection is never used while the server is closing it.
_KEEP_ALIVE_S = 3.0


@dataclass(frozen=True)
class PoolSettings:
    """How a pool sends.

    Attributes:
        limit: requests in flight over all servers. Waiting for a retry takes no place.
        timeout_s: seconds for one try.
        retries: tries after the first.
        backoff_s: seconds before the first retry; doubles up to 10 s, times a random factor in [0.5, 1].
        probe_interval_s: seconds between probes of a server. One that is gone is looked for every second.

    Raises:
        ConfigError: a value that cannot work.
    """

    limit: int = 64
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 0.5
    probe_interval_s: float = 10.0

    def __post_init__(self) -> None:
        rules = (
            ("limit", self.limit >= 1, "1 or more"),
            ("timeout_s", 0 < self.timeout_s < float("inf"), "positive and finite"),
            ("retries", self.retries >= 0, "0 or more"),
            ("backoff_s", 0 <= self.backoff_s < float("inf"), "0 or more and finite"),
            ("probe_interval_s", 0 < self.probe_interval_s < float("inf"), "positive and finite"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{key} of a server pool must be {rule}; got {getattr(self, key)!r}")


class _Running:
    """What belongs to one event loop."""

    def __init__(self, limit: int, session: aiohttp.ClientSession) -> None:
        self.loop = asyncio.get_running_loop()
        self.session = session
        self.slots = Slots(limit)
        self.revived = Signal()
        self.look_now = Signal()
        self.to_probe: set[str] = set()
        self.users = 0
        self.closed = False
        self.keeper: asyncio.Task[None]


class ServerPool:
    """See the module.

    Args:
        urls: addresses, with or without /v1.
        settings: limits.
        api_key: sent as a bearer token; never part of a message.
        name: what the servers are called in messages, such as "judge".

    Raises:
        ConfigError: no URL, a malformed one, or the same one twice.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: PoolSettings | None = None,
        *,
        api_key: str | None = None,
        name: str = "server",
    ) -> None:
        addresses = [server_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ConfigError(f"a pool needs one or more different server URLs; got {addresses}")
        self.settings = settings or PoolSettings()
        self.name = name
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._servers = [Server(url) for url in addresses]
        self._running: _Running | None = None
        self._random = random.Random()  # of its own: training seeds the global one
        self._requests = self._retries = self._failures = self._turns = self._most_in_flight = 0

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' normalised addresses."""
        return tuple(server.url for server in self._servers)

    async def post(
        self, path: str, payload: Mapping[str, Any] | bytes, *, deadline: float | None = None, home: int | None = None
    ) -> Any:
        """POST JSON and decode the JSON answer.

        Args:
            path: from the server's root, such as "/v1/embeddings".
            payload: what `json.dumps` takes, or JSON that is encoded already (large media: outside the event loop).
            deadline: `time.monotonic()` at which the request ends, come what may. With one, a request waits that long
                for a server to come back; without, every `probe_interval_s` of waiting counts as a try.
            home: requests of the same number share a server where they can, for its prefix cache.

        Raises:
            ServerError: there is no answer; `cause` says why.
            EmbedRLError: the pool is in use by another event loop.
        """
        return await self._request("POST", path, payload, deadline, home)

    async def get(self, path: str, *, deadline: float | None = None) -> Any:
        """GET and decode the JSON answer; as `post`."""
        return await self._request("GET", path, None, deadline)

    async def __aenter__(self) -> ServerPool:
        self._open().users += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        running = self._running
        if running is not None and running.loop is asyncio.get_running_loop():
            running.users -= 1
            if running.users <= 0:
                await self.aclose()

    async def aclose(self) -> None:
        """End this loop's session and probes; requests in flight fail. A later request opens them again."""
        running = self._running
        if running is None or running.loop is not asyncio.get_running_loop():
            return
        self._running = None
        running.closed = True
        running.revived.fire()
        running.keeper.cancel()
        await asyncio.wait((running.keeper,))
        await running.session.close()  # a keeper that never began has not

    def stats(self) -> PoolStats:
        """Counts so far and the servers' state."""
        servers = tuple(ServerStats(s.url, s.up, s.in_flight, s.requests, s.last_error) for s in self._servers)
        return PoolStats(self._requests, self._retries, self._failures, self._most_in_flight, servers)

    def metrics(self) -> dict[str, float]:
        """`stats().metrics()`."""
        return self.stats().metrics()

    async def _request(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | bytes | None,
        deadline: float | None,
        home: int | None = None,
    ) -> Any:
        if not path.startswith("/"):
            raise ValueError(f"path must start at the server's root, with a slash; got {path!r}")
        running = self._open()
        self._requests += 1
        avoid: Server | None = None
        before: TryFailed | None = None
        tries = 0
        try:
            while True:
                try:
                    server = await self._acquire(running, deadline, avoid, home)
                    avoid = server
                    return await self._try(running, server, method, path, payload, deadline)
                except TryFailed as failed:
                    tries += 1
                    delay = self._backoff(tries)
                    late = deadline is not None and time.monotonic() + delay >= deadline
                    if not failed.retry or tries > self.settings.retries or late:
                        raise self._error(failed, f"{method} {path}", tries, avoid, before) from failed
                    before = failed
                self._retries += 1
                await asyncio.sleep(delay)
        except ServerError:
            self._failures += 1
            raise

    async def _acquire(
        self, running: _Running, deadline: float | None, avoid: Server | None, home: int | None
    ) -> Server:
        """A slot, and the server to use it on."""
        while True:
            if running.closed:
                raise TryFailed("pool closed", "the pool was closed while the request was waiting", retry=False)
            up = [server for server in self._servers if server.up]
            left = None if deadline is None else deadline - time.monotonic()
            if not up:
                patience = left if left is not None else self.settings.probe_interval_s
                if patience <= 0 or not await running.revived.wait(patience):
                    errors = "; ".join(f"{server.url}: {server.last_error}" for server in self._servers)
                    raise TryFailed("no server is up", errors, retry=left is None)
                continue
            pause = min(server.ready_at for server in up) - time.monotonic()
            if left is not None and left <= max(pause, 0.0):
                raise TryFailed("deadline", "there was no time left to send the request", retry=False)
            if pause > 0:
                await asyncio.sleep(pause)
                continue
            if not await running.slots.acquire(left):
                raise TryFailed("deadline", "no slot became free in time", retry=False)
            server = self._choose(avoid, home)
            if server is not None and not running.closed:
                return server
            running.slots.release()

    def _choose(self, avoid: Server | None, home: int | None = None) -> Server | None:
        now = time.monotonic()
        ready = [server for server in self._servers if server.up and server.ready_at <= now]
        others = [server for server in ready if server is not avoid] or ready
        least = min(others, key=lambda server: (server.in_flight, server.turn), default=None)
        if least is None or home is None:
            return least
        wanted = self._servers[home % len(self._servers)]
        if wanted not in others:  # its homes spread over the others
            wanted = others[home % len(others)]
        return wanted if wanted.in_flight <= least.in_flight + HOME_SLACK else least

    async def _try(
        self,
        running: _Running,
        server: Server,
        method: str,
        path: str,
        payload: Mapping[str, Any] | bytes | None,
        deadline: float | None,
    ) -> Any:
        """One try on a server, in the slot that the caller has acquired."""
        self._turns += 1
        server.turn = self._turns
        server.requests += 1
        server.in_flight += 1
        self._most_in_flight = max(self._most_in_flight, sum(s.in_flight for s in self._servers))
        revival = server.revival
        left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
        timeout_s = self.settings.timeout_s if left is None else min(self.settings.timeout_s, left)
        try:
            answer = await server.send(running.session, method, path, payload, timeout_s)
        except TryFailed as failed:
            if running.closed:
                raise TryFailed("pool closed", "the pool was closed during the request", retry=False) from failed
            if failed.cause == "timeout" and timeout_s < self.settings.timeout_s:  # says nothing about the server
                raise TryFailed("deadline", "the answer did not come in time", retry=False) from failed
            if failed.down and server.revival == revival:
                self._mark_down(running, server, failed)
            raise
        finally:
            server.in_flight -= 1
            running.slots.release()
        self._mark_up(running, server)
        return answer

    def _backoff(self, tries: int) -> float:
        longest = min(self.settings.backoff_s * 2.0 ** min(tries - 1, 30), _LONGEST_BACKOFF_S)
        return longest * self._random.uniform(0.5, 1.0)

    def _error(
        self, failed: TryFailed, what: str, tries: int, server: Server | None, before: TryFailed | None
    ) -> ServerError:
        where = server.url if server is not None and failed.cause != "no server is up" else ", ".join(self.urls)
        message = f"{self.name}: {what} failed at {where}, try {tries}: {failed.cause} ({failed})"
        if before is not None and before.cause != failed.cause:
            message += f"; the try before: {before.cause} ({before})"
        return ServerError(message, failed.cause, failed.status)

    def _mark_down(self, running: _Running, server: Server, failed: TryFailed, *, look: bool = True) -> None:
        server.last_error = failed.cause
        if not server.up:
            return
        server.up = False
        _LOG.warning("%s %s is down: %s (%s)", self.name, server.url, failed.cause, failed)
        if not any(other.up for other in self._servers):
            running.to_probe = {other.url for other in self._servers if look or other is not server}
        elif look and failed.cause != "timeout":  # one that only dropped a connection may be back at once
            running.to_probe.add(server.url)
        if running.to_probe:
            running.look_now.fire()

    def _mark_up(self, running: _Running, server: Server) -> None:
        if not server.up:
            server.up = True
            server.revival += 1
            _LOG.warning("%s %s is up again", self.name, server.url)
            running.revived.fire()

    def _open(self) -> _Running:
        loop = asyncio.get_running_loop()
        running = self._running
        if running is not None and running.loop is loop and not running.closed:
            return running
        if running is not None and running.loop.is_running() and not running.closed:
            raise EmbedRLError(f"the pool of {self.name} servers is in use by another event loop; make one pool a loop")
        for server in self._servers:
            server.in_flight = 0
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None)
        )
        self._running = running = _Running(self.settings.limit, session)
        running.keeper = loop.create_task(self._keep(running), name=f"health of {self.name} servers")
        return running

    async def _keep(self, running: _Running) -> None:
        """Watch the servers until cancelled (by `aclose`, or by `asyncio.run` at its end), then close the session."""
        watchers = [running.loop.create_task(self._watch(running, server)) for server in self._servers]
        try:
            await asyncio.wait(watchers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            running.closed = True
            running.revived.fire()
            for watcher in watchers:
                watcher.cancel()
            await asyncio.wait(watchers)
            await running.session.close()

    async def _watch(self, running: _Running, server: Server) -> None:
        """Probe a server at its interval, and at once where `_mark_down` asks for it."""
        timeout_s = min(self.settings.timeout_s, _PROBE_TIMEOUT_S)
        while not running.closed:
            running.to_probe.discard(server.url)
            try:
                await server.probe(running.session, timeout_s)
                self._mark_up(running, server)
            except TryFailed as failed:
                if failed.cause != "timeout":  # a busy server may be late with its health
                    self._mark_down(running, server, failed, look=False)
            if server.url not in running.to_probe:
                await running.look_now.wait(self._interval(server))

    def _interval(self, server: Server) -> float:
        """Seconds to the next probe. One that timed out is left alone as long as others are up."""
        gone = not server.up and server.last_error != "timeout"
        if gone or not any(other.up for other in self._servers):
            return min(_LOOK_FOR_S, self.settings.probe_interval_s)
        return self.settings.probe_interval_s
