# SPDX-License-Identifier: Apache-2.0
"""Several OpenAI-style servers behind one asynchronous client.

    pool = ServerPool(["http://a:8000", "http://b:8000"], PoolSettings(limit=64))
    async with pool:
        answer = await pool.post("/v1/chat/completions", {...}, deadline=time.monotonic() + 60)

`AsyncOpenAI` sends, with the key, pooled connections and typed errors. Its own retries are off: they stay on one
server, keep their place among the requests in flight, end at no deadline, and know neither status 425 nor `backoff_s`.
Its time-outs are those of connecting and of single reads. What a run relies on is added here: attempts and requests end
in time; a retry goes to another server; a request that fails for good says why; a lost server (it cannot be reached, or
does not answer in time) gets no requests until its /health answers.

Connections, places and probes belong to an event loop and end with it; what is known of the servers stays. One loop
uses a pool at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from httpx2 import Limits  # comes with openai
from openai import AsyncOpenAI, DefaultAioHttpClient, omit

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.serving.server import Server, ServerError, server_url, within

_LOG = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it says a line a request
AFFINITY_SLACK = 16
"""Requests that a server may have above the least busy one and still get those of its affinity."""
_LONGEST_BACKOFF_S = 10.0
_PROBE_TIMEOUT_S = 5.0
_LOOK_S = 1.0
"""Seconds between probes of a server that is gone: rows wait for it, and to be refused costs nothing."""


@dataclass(frozen=True)
class PoolSettings:
    """How a pool sends.

    Attributes:
        limit: requests in flight over all servers. Waiting for a retry takes no place.
        timeout_s: seconds for one attempt.
        retries: attempts after the first.
        backoff_s: seconds before the first retry; doubles up to 10 s, times a random factor in [0.5, 1].
        probe_interval_s: seconds between probes of a server that timed out while others are up.
    """

    limit: int
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 0.5
    probe_interval_s: float = 10.0

    def __post_init__(self) -> None:
        for key, holds, rule in (
            ("limit", self.limit >= 1, "1 or more"),
            ("timeout_s", 0 < self.timeout_s < float("inf"), "positive and finite"),
            ("retries", self.retries >= 0, "0 or more"),
            ("backoff_s", 0 <= self.backoff_s < float("inf"), "0 or more and finite"),
        ):
            if not holds:
                raise ConfigError(f"{key} of a server pool must be {rule}; got {getattr(self, key)!r}")


class _Call(NamedTuple):
    """What a caller of the pool asks for; GET without a body."""

    path: str
    body: Mapping[str, Any] | bytes | None
    deadline: float | None
    affinity: int | None = None

    @property
    def left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()


class ServerPool:
    """See the module.

    Args:
        urls: addresses, with or without /v1.
        settings: limits.
        api_key: sent as a bearer token; never part of a message.
        name: what the servers are called in messages, such as "judge".
    """

    def __init__(
        self, urls: Sequence[str], settings: PoolSettings, *, api_key: str | None = None, name: str = "server"
    ) -> None:
        addresses = [server_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ConfigError(f"a pool needs one or more different server URLs; got {addresses}")
        self.settings, self.name = settings, name
        self.servers = tuple(Server(url) for url in addresses)
        self.requests = self.retries = 0
        """Calls so far, and attempts after a call's first."""
        self._api_key = api_key
        self._session: _Session | None = None
        self._random = random.Random()  # of its own: training seeds the global one

    @classmethod
    def from_config(cls, config: Any, urls: Sequence[str], *, section: str, name: str, share: int = 1) -> ServerPool:
        """The pool of a configuration section with `limit`, `timeout_s`, `retries`, `backoff_s` and `api_key_env`.

        Args:
            section: its name for messages, such as "embedrl.judge".
            share: processes that send; each has its part of the limit.
        """
        key = os.environ.get(config.api_key_env) if config.api_key_env is not None else None
        if config.api_key_env is not None and not key:
            raise ConfigError(f"{section}.api_key_env names {config.api_key_env}, which is not set in this process")
        limit = max(1, config.limit // share)
        settings = PoolSettings(limit, config.timeout_s, config.retries, config.backoff_s)
        try:
            return cls(urls, settings, api_key=key, name=name)
        except ConfigError as error:
            raise ConfigError(f"{section}.urls: {error}") from error

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' normalised addresses."""
        return tuple(server.url for server in self.servers)

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any] | bytes,
        *,
        deadline: float | None = None,
        affinity: int | None = None,
    ) -> Any:
        """POST JSON and decode the JSON answer.

        Args:
            path: from the server's root, such as "/v1/embeddings".
            payload: a mapping, or JSON that is encoded already (large media: outside the event loop).
            deadline: `time.monotonic()` at which the request ends, come what may. With one, a request waits that long
                for a lost server to come back; without, finding no server up counts as an attempt.
            affinity: requests of the same number share a server where they can, for its prefix cache.
        """
        return await self._request(_Call(path, payload, deadline, affinity))

    async def get(self, path: str, *, deadline: float | None = None) -> Any:
        """GET and decode the JSON answer; as `post`."""
        return await self._request(_Call(path, None, deadline))

    async def models(self, *, deadline: float | None = None) -> list[dict[str, Any]]:
        """The served models as /v1/models lists them; as `post`. Entries have an "id", vLLM's "owned_by" = "vllm"."""
        answer = await self.get("/v1/models", deadline=deadline)
        listed = answer.get("data") if isinstance(answer, dict) else None
        return [one for one in listed if isinstance(one, dict) and "id" in one] if isinstance(listed, list) else []

    async def __aenter__(self) -> ServerPool:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End this loop's connections and probes; requests in flight fail. A later request opens them again."""
        session = self._session
        if session is not None and session.loop is asyncio.get_running_loop():
            self._session = None
            session.keeper.cancel()
            await asyncio.wait((session.keeper,))

    def _open(self) -> _Session:
        session = self._session
        if session is not None and session.loop is asyncio.get_running_loop():
            return session
        if session is not None and session.loop.is_running():
            raise EmbedRLError(f"the pool of {self.name} servers is in use by another event loop; make one pool a loop")
        self._session = session = _Session(self.urls, self.settings.limit, self._api_key)
        for server in self.servers:
            if server.up:
                session.some_up.set()
            else:
                self._watch(session, server)
        return session

    async def _request(self, call: _Call) -> Any:
        session = self._open()
        self.requests += 1
        failures: list[ServerError] = []  # one an attempt
        try:
            done = await within(call.left, session.start(self._attempts(session, call, failures)))
            if done.cancelled():  # by `aclose`
                raise ServerError("pool closed", "pool closed")
            return done.result()
        except TimeoutError:
            some_up = any(server.up for server in self.servers)
            failure = ServerError("deadline", "deadline") if some_up else self._none_is_up()
        except ServerError as error:
            failure = error
        before = [one for one in failures if one is not failure]
        what = f"{'GET' if call.body is None else 'POST'} {call.path}"
        message = f"{self.name}: {what} failed, try {len(before) + 1}: {failure}"
        if before and before[-1].cause != failure.cause:
            message += f"; the try before: {before[-1]}"
        raise ServerError(message, failure.cause, failure.status) from failure

    async def _attempts(self, session: _Session, call: _Call, failures: list[ServerError]) -> Any:
        """The first answer; attempts without one are added to `failures`."""
        avoid: Server | None = None
        while True:
            try:
                async with session.places:
                    avoid = server = await self._free_server(session, call, avoid)
                    return await self._attempt(session, server, call)
            except ServerError as failure:
                failures.append(failure)
                longest = min(self.settings.backoff_s * 2.0 ** min(len(failures) - 1, 30), _LONGEST_BACKOFF_S)
                pause = longest * self._random.uniform(0.5, 1.0)
                late = call.left is not None and pause >= call.left
                if not failure.transient or len(failures) > self.settings.retries or late:
                    raise
            self.retries += 1
            await asyncio.sleep(pause)

    async def _free_server(self, session: _Session, call: _Call, avoid: Server | None) -> Server:
        """The server of the next attempt, as soon as one is up and its Retry-After is over."""
        while True:
            now = time.monotonic()
            up = [server for server in self.servers if server.up]
            ready = [server for server in up if server.ready_at <= now]
            if ready:
                return self._choose(ready, avoid, call.affinity)
            if up:
                await asyncio.sleep(min(_LOOK_S, min(server.ready_at for server in up) - now))
            elif call.deadline is not None:
                await session.some_up.wait()
            else:
                try:
                    await within(self.settings.probe_interval_s, asyncio.ensure_future(session.some_up.wait()))
                except TimeoutError:
                    raise self._none_is_up() from None

    def _choose(self, ready: list[Server], avoid: Server | None, affinity: int | None) -> Server:
        """The server with the fewest requests in flight, of equals the least used; another than `avoid` if it can be.
        That of the affinity, unless it has `AFFINITY_SLACK` more in flight."""
        others = [server for server in ready if server is not avoid] or ready
        least = min(others, key=lambda server: (server.in_flight, server.requests))
        if affinity is None:
            return least
        wanted = self.servers[affinity % len(self.servers)]
        if wanted not in others:  # what it would have had spreads over the others
            wanted = others[affinity % len(others)]
        return wanted if wanted.in_flight <= least.in_flight + AFFINITY_SLACK else least

    async def _attempt(self, session: _Session, server: Server, call: _Call) -> Any:
        server.requests += 1
        server.in_flight += 1
        try:
            answer = await server.exchange(session.clients[server.url], call.path, call.body, self.settings.timeout_s)
        except ServerError as failure:
            if failure.status is None:
                self._lose(session, server, failure)
            elif failure.status >= 500:
                self._watch(session, server)
            raise
        finally:
            server.in_flight -= 1
        self._recover(session, server)
        return answer

    def _none_is_up(self) -> ServerError:
        errors = "; ".join(f"{server.url}: {server.last_error}" for server in self.servers)
        return ServerError(f"no server is up ({errors})", "no server is up")

    def _lose(self, session: _Session, server: Server, failure: ServerError) -> None:
        server.last_error = failure.cause
        if server.up:
            server.up = False
            _LOG.warning("%s %s is down: %s", self.name, server.url, failure)
            if not any(other.up for other in self.servers):
                session.some_up.clear()
        self._watch(session, server)

    def _recover(self, session: _Session, server: Server) -> None:
        if not server.up:
            server.up = True
            _LOG.warning("%s %s is up again", self.name, server.url)
            session.some_up.set()

    def _watch(self, session: _Session, server: Server) -> None:
        """Ask the server's /health until it answers; one watch a server."""
        if server not in session.watched:
            session.watched.add(server)
            session.start(self._look(session, server)).add_done_callback(lambda _: session.watched.discard(server))

    async def _look(self, session: _Session, server: Server) -> None:
        """One that is gone is looked for every second. One that timed out is left alone while others are up: it may
        answer /health and no request."""
        last = time.monotonic()
        while True:
            hangs = not server.up and server.last_error == "timeout"
            others = any(other.up for other in self.servers if other is not server)
            if not (hangs and others) or time.monotonic() >= last + self.settings.probe_interval_s:
                failure = await self._probe(session, server)
                if failure is None:
                    self._recover(session, server)
                    return
                if failure.cause != "timeout" or not server.up:  # a busy server may be late with its health
                    self._lose(session, server, failure)
                last = time.monotonic()
            await asyncio.sleep(min(_LOOK_S, self.settings.probe_interval_s))

    async def _probe(self, session: _Session, server: Server) -> ServerError | None:
        """Why the server is not well, or None. One without the route /health answers too, which is enough."""
        try:
            timeout_s = min(self.settings.timeout_s, _PROBE_TIMEOUT_S)
            await server.exchange(session.clients[server.url], "/health", None, timeout_s)
        except ServerError as failure:
            if failure.status is None or failure.status >= 500:
                return failure
        return None


class _Session:
    """What belongs to one event loop, and ends with it."""

    def __init__(self, urls: Sequence[str], limit: int, api_key: str | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.places = asyncio.Semaphore(limit)
        self.some_up = asyncio.Event()
        self.watched: set[Server] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        # aiohttp below: with 256 requests in flight httpx's own transport takes 7 ms of CPU a request, this one 2. No
        # proxies of the environment: servers are the run's own. Attempts end by `within`. An idle connection goes
        # before uvicorn's 5 s, so that none is used while the server is closing it.
        limits = Limits(max_connections=limit + len(urls), keepalive_expiry=3.0)  # a probe of each server
        context = ssl.create_default_context()  # heeds SSL_CERT_FILE, which trust_env=False would leave out
        self._http = DefaultAioHttpClient(trust_env=False, timeout=None, limits=limits, verify=context)
        fixed: dict[str, Any] = {"max_retries": 0, "timeout": None, "http_client": self._http}
        # Left to itself AsyncOpenAI sends key, organisation and project of OpenAI's own variables.
        headers = {"OpenAI-Organization": omit, "OpenAI-Project": omit}
        fixed |= {"api_key": api_key or "EMPTY", "default_headers": headers}
        self.clients = {url: AsyncOpenAI(base_url=url, **fixed) for url in urls}
        self.keeper = self.loop.create_task(self._keep())

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it as a task that ends with the session."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self) -> None:
        """Wait to be cancelled (by `aclose`, or by `asyncio.run` at its end), then close everything."""
        try:
            await asyncio.Event().wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await self._http.aclose()
