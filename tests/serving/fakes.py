# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server inside the test's event loop, and a watch on that loop."""

import asyncio
import contextlib
import inspect
import json

from aiohttp import web


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
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()


@contextlib.asynccontextmanager
async def heartbeat(every=0.002):
    """Collects, in seconds, how much later than asked for the event loop came round."""
    loop, gaps = asyncio.get_running_loop(), [0.0]

    async def beat():
        while True:
            start = loop.time()
            await asyncio.sleep(every)
            gaps.append(loop.time() - start - every)

    task = loop.create_task(beat())
    try:
        yield gaps
    finally:
        task.cancel()
