# SPDX-License-Identifier: Apache-2.0
"""Judges inside the test's event loop, and what they are asked."""

import asyncio
import re

from aiohttp import web

from embedrl_verl.judge import JudgeSettings, ListwiseJudge
from tests.judge.batches import lines_of, make_batch
from tests.serving.fakes import FakeServer, quick_pool


def reading(body):
    """The right number: the list has the judged answer on that line."""
    shown, judged = lines_of(body["messages"][0]["content"])
    return next(number for number, text in shown.items() if text == re.search(r"\d+", judged)[0])


def says(pick, *, vllm=False, chat=None):
    """A server whose judge answers `pick(body)`; with `chat`, that is asked for the response instead."""

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "served"}]}
        if path == "/version":
            return {"version": "0.24.0"} if vllm else web.Response(status=404)
        if chat is not None:
            return chat(body)
        return {"choices": [{"message": {"content": pick(body)}}]}

    return answer


def chats(server):
    return [body for body in server.bodies if body is not None]


async def judged(server, batch=None, pool=None, step=0, call=None, **settings):
    judge = ListwiseJudge(quick_pool(server.url, **(pool or {})), JudgeSettings(**{"style": "compact", **settings}))
    return await judge.judge(make_batch() if batch is None else batch, step=step, **(call or {}))


def run(answer, *arguments, **settings):
    """Judge with a server that answers so; also gives the server."""

    async def main():
        async with FakeServer(answer) as server:
            return await judged(server, *arguments, **settings), server

    return asyncio.run(main())
