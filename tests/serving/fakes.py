# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server inside the test's event loop, a watch on that loop, and pools for tests."""

import asyncio
import contextlib
import functools
import inspect
import json

import pytest
from aiohttp import web

from embedrl_verl.platforms.ports import free_port
from embedrl_verl.serving import PoolSettings, ServerError, ServerPool

QUICK = {"limit": 64, "timeout_s": 10.0, "backoff_s": 0.01, "probe_interval_s": 0.05}


def quick_pool(*urls, api_key=None, **change):
    """A pool that loses no time in retries and probes."""
    return ServerPool(urls, PoolSettings(**{**QUICK, **change}), api_key=api_key, name="fake")


def in_a_loop(test):
    """Runs an asynchronous test."""

    @functools.wraps(test)
    def run(*arguments, **keywords):
        asyncio.run(asyncio.wait_for(test(*arguments, **keywords), 120))

    return run


async def failure_of(request):
    """The ServerError in which it ends."""
    with pytest.raises(ServerError) as caught:
        await request
    return caught.value


def free_url():
    """An address at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


class FakeServer:
    """`answer(path, body)` gives a JSON value or a Response, at once or awaited; /health answers `health`."""

    def __init__(self, answer, port=0, health=200):
        self.answer, self.port, self.health = answer, port, health
        self.bodies, self.headers, self.now, self.most = [], [], 0, 0

    async def _handle(self, request):
        if request.path == "/health":
            return web.Response(status=self.health)
        body = json.loads(await request.read() or "null")
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            result = self.answer(request.path, body)
            result = await result if inspect.isawaitable(result) else result
        finally:
            self.now -= 1
        return result if isinstance(result, web.StreamResponse) else web.json_response(result)

    async def __aenter__(self):
        server = web.Server(self._handle, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()


@contextlib.asynccontextmanager
async def heartbeat(beats, every=0.002):
    """Puts the time into `beats` whenever the event loop has come round."""
    loop = asyncio.get_running_loop()

    async def beat():
        while True:
            await asyncio.sleep(every)
            beats.append(loop.time())

    task = loop.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
