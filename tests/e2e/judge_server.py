# SPDX-License-Identifier: Apache-2.0
"""A judge of its own process that always names candidate 1, for tests that kill and hang it.

`python judge_server.py PORT FOLDER`: writes one byte a judged request to FOLDER/requests; with a file FOLDER/garbage it
answers something that is no number.
"""

import asyncio
import sys
from pathlib import Path

from aiohttp import web

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


async def answer(request: web.Request) -> web.Response:
    await request.json()
    await asyncio.sleep(0.3)  # so that a fault meets requests in flight
    with (FOLDER / "requests").open("a") as count:
        count.write(".")
    text = "the red one" if (FOLDER / "garbage").exists() else "1"
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "first"}]})


app = web.Application()
app.add_routes([web.post("/v1/chat/completions", answer), web.get("/v1/models", models), web.get("/health", models)])
web.run_app(app, host="127.0.0.1", port=PORT, print=None)
