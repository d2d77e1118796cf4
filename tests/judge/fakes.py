# SPDX-License-Identifier: Apache-2.0
"""Batches to judge, whose T-CoTs answer with the number of their pair, and judges inside the test's event loop."""

import asyncio
import re

import torch
from aiohttp import web

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.judge import ListwiseJudge
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot
from tests.serving.fakes import FakeServer, quick_pool


def tcot_of(answer, thinking="It says"):
    return parse_tcot(
        f'<thinking>{thinking} {{"text_keywords": ["a"]}}.</thinking><rethink>Yes.</rethink><answer>{answer}</answer>'
    )


def lines_of(text):
    """Numbered texts of a compact prompt, and its last line."""
    *lines, last = text.splitlines()
    found = [re.fullmatch(r"(?P<text>.*)=(?P<number>\d+)", line) for line in lines]
    return {match["number"]: match["text"] for match in found}, last


def make_batch(pairs=6, rollouts=4, seed=0, noise=0.8, order=None, **change):
    """Rows of random embeddings near their pair's direction in the given `order` (a tensor of rows)."""
    generator = torch.Generator().manual_seed(seed)
    side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
    centre = torch.randn(pairs, 24, generator=generator)[pair]
    vectors = centre + noise * torch.randn(len(side), 24, generator=generator)
    arguments = {
        "side": side,
        "pair": pair,
        "rollout": rollout,
        "content": pair,
        "embeddings": torch.nn.functional.normalize(vectors, dim=1),
        "valid": torch.ones_like(side, dtype=torch.bool),
    } | change
    order = torch.arange(len(side)) if order is None else order
    arguments = {name: value[order] for name, value in arguments.items()}
    tcots = [tcot_of(p) for p in arguments["pair"].tolist()]
    return RewardBatch.build(**arguments, tcots=tcots, required=["text_keywords"] * len(order))


def judged_line(body):
    """The last line of a compact prompt: the judged answer."""
    return lines_of(body["messages"][0]["content"])[1]


def reading(body):
    """The right number: the list has the judged answer on that line."""
    shown, judged = lines_of(body["messages"][0]["content"])
    return next(number for number, text in shown.items() if text == re.search(r"\d+", judged)[0])


def reply(text, **choice):
    return {"choices": [{"message": {"content": text}, **choice}]}


def says(pick=None, *, vllm=False, gateway=False, chat=None):
    """A server whose judge answers `pick(body)`; with `chat`, that is asked for the response instead. `gateway`: vLLM
    behind one that lists the model as its own."""

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "served", "owned_by": "vllm" if vllm else "somebody"}]}
        if path == "/version":  # asked of a server that does not list its models as vLLM's
            return {"version": "0.24.0"} if gateway else web.Response(status=404)
        return chat(body) if chat is not None else reply(pick(body))

    return answer


def chats(server):
    return [body for body in server.bodies if body is not None]


def judge_at(*urls, pool=None, **settings):
    return ListwiseJudge(quick_pool(*urls, **(pool or {})), JudgeConfig(**{"style": "compact", **settings}))


def run(answer, batch=None, *, step=0, steps=1, instructions=None, show=None, **settings):
    """Judge with a server that answers so; the last step's judgement, and the server."""
    batch = make_batch() if batch is None else batch

    async def main():
        async with FakeServer(answer) as server:
            judge = judge_at(server.url, **settings)
            for number in range(step, step + steps):
                found = await judge.judge(batch, step=number, instructions=instructions, images=show)
            return found, server

    return asyncio.run(main())
