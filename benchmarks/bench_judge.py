# SPDX-License-Identifier: Apache-2.0
"""The judge stage against a server of known latency: how close to the limit it runs, and what blocks the event loop.

    python benchmarks/bench_judge.py [--rows 512] [--limit 64] [--latency 0.2] [--image-kb 0] [--rounds 3]

prints a markdown table. The server (a process of its own, several with --servers) answers "1" after `latency` seconds;
it stands for a judge that is never the bottleneck. The fastest that any client can be is ceil(rows / limit) x latency;
the target is 1.3 times that. `blocked` is the longest time that the event loop did not come round, from a task that
sleeps 1 ms; target: below 50 ms. `busy` is the most CPU time that its thread used between two such rounds: what
`blocked` is on a machine with nothing else to do. `lists` and `prompts` are the same work done alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from aiohttp import web

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.judge import Judgement, ListwiseJudge, judge_lists, judge_prompt
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.serving import PoolSettings, ServerPool
from embedrl_verl.tcot import parse_tcot

TARGET_RATIO, TARGET_BLOCKED = 1.3, 0.05
BEAT = 0.001


def serve(latency: float, address: Connection) -> None:
    """Answer like an OpenAI-style server; tells its port."""

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "fake"}]})
        if request.path != "/v1/chat/completions":
            return web.Response(status=200 if request.path == "/health" else 404)
        await asyncio.sleep(latency)
        return web.json_response({"choices": [{"message": {"content": "1"}}]})

    async def run() -> None:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def make_batch(rows: int, rollouts: int, words: int) -> RewardBatch:
    """`rows` rollouts in all, T-CoTs of about `words` words."""
    pairs = rows // (2 * rollouts)
    side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
    vectors = torch.randn(pairs, 256)[pair] + torch.randn(len(side), 256)
    texts = [
        f"pair {p}, rollout {r}: " + "what the input shows " * (words // 4) for p, r in zip(pair, rollout, strict=True)
    ]
    return RewardBatch.build(
        side=side,
        pair=pair,
        rollout=rollout,
        content=pair,
        tcots=[parse_tcot(f"<thinking>{text}</thinking><rethink>yes</rethink><answer>a</answer>") for text in texts],
        required=["text_keywords"] * len(side),
        embeddings=torch.nn.functional.normalize(vectors, dim=1),
    )


async def stage(
    judge: ListwiseJudge, batch: RewardBatch, images: Callable[[int], Sequence[str]] | None
) -> tuple[Judgement, float, float]:
    """One stage, the longest time that the event loop did not come round, and the most CPU time it used in one."""
    blocked = busy = 0.0

    async def beat() -> None:
        nonlocal blocked, busy
        loop = asyncio.get_running_loop()
        while True:
            start, start_cpu = loop.time(), time.thread_time()
            await asyncio.sleep(BEAT)
            blocked = max(blocked, loop.time() - start - BEAT)
            busy = max(busy, time.thread_time() - start_cpu)

    task = asyncio.get_running_loop().create_task(beat())
    await asyncio.sleep(10 * BEAT)
    found = await judge.judge(batch, step=0, images=images)
    task.cancel()
    return found, blocked, busy


def build_alone(batch: RewardBatch, images: Sequence[str]) -> tuple[float, float]:
    """Seconds for the lists, and for all prompts as JSON."""
    start = time.perf_counter()
    lists = judge_lists(batch, seed=0, step=0)
    middle = time.perf_counter()
    for listed in lists:
        prompt = judge_prompt([batch.tcots[row] for row in listed.candidates], side=listed.side, images=images)
        for row in listed.rows:
            json.dumps(prompt.messages(batch.tcots[row]))
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--image-kb", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batch = make_batch(arguments.rows, arguments.rollouts, arguments.words)
    shown = ["data:image/png;base64," + "A" * (1024 * arguments.image_kb)] if arguments.image_kb else []
    urls, processes = [], []
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.servers):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(arguments.latency, there), daemon=True))
        processes[-1].start()
        urls.append(f"http://127.0.0.1:{here.recv()}")
    best = math.ceil(len(batch) / arguments.limit) * arguments.latency
    judge = ListwiseJudge(ServerPool(urls, PoolSettings(limit=arguments.limit)), JudgeConfig(images=bool(shown)))
    print(f"{len(batch)} rows, limit {arguments.limit}, latency {arguments.latency} s, servers {arguments.servers}\n")
    columns = ["round", "best possible s", "stage s", "ratio (target)", "blocked ms (target)", "busy ms", "lists ms"]
    columns += ["prompts ms"]
    print("|".join(["", *columns, ""]))
    print("|" + "---|" * len(columns))
    for number in range(arguments.rounds):
        found, blocked, busy = asyncio.run(stage(judge, batch, (lambda row: shown) if shown else None))
        if found.causes or found.scores.isnan().any():
            raise SystemExit(f"rows without an answer: {found.causes}")
        lists_s, prompts_s = build_alone(batch, shown)
        numbers = [f"{best:.2f}", f"{found.seconds:.2f}", f"{found.seconds / best:.2f} ({TARGET_RATIO})"]
        numbers.append(f"{1000 * blocked:.0f} ({1000 * TARGET_BLOCKED:.0f})")
        numbers += [f"{1000 * seconds:.0f}" for seconds in (busy, lists_s, prompts_s)]
        print("|".join(["", str(number), *numbers, ""]))
    for process in processes:
        process.terminate()


if __name__ == "__main__":
    main()
