# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests in flight: annotation against a server of known latency that is never the bottleneck.

    python benchmarks/bench_annotate_scale.py [--pairs 10000] [--limit 2000] [--latency 2.0] [--image 224]

The server (a process of its own) answers a fitting T-CoT after `latency` seconds. `at best` is what the latency allows
with so many requests at once. `blocked` is the longest time that the event loop did not come round, `peak` the highest
memory of this process and its growth over its start.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from aiohttp import web
from PIL import Image

from embedrl_verl.annotate.backends import ServerBackend
from embedrl_verl.annotate.job import Run, RunSettings
from embedrl_verl.annotate.prompts import TcotPrompts
from embedrl_verl.annotate.tcots import AnnotateJob, TcotSettings
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.serving import PoolSettings, ServerPool

EVIDENCE = ('{"text_keywords":["red"]}', '{"bbox_2d":[0,0,1000,1000]}')


def serve(latency: float, address: Connection) -> None:
    """Answer like an OpenAI-style server; tells its port."""

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "fake"}]})
        if request.path != "/v1/chat/completions":
            return web.Response(status=200 if request.path == "/health" else 404)
        await asyncio.sleep(latency)
        text = f"<thinking>{EVIDENCE[b'image_url' in body]}</thinking><rethink>ok</rethink><answer>a</answer>"
        usage = {"prompt_tokens": 100, "completion_tokens": 30}
        return web.json_response({"choices": [{"message": {"content": text}}], "usage": usage})

    async def run() -> None:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        address.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def pairs(count: int, side: int) -> Iterator[PairRecord]:
    """Image to text; images of smooth blobs, a few different ones."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(32 if side else 0):
        buffer = io.BytesIO()
        blobs = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        blobs.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    for number in range(count):
        query = Item(images=(images[number % 32],)) if side else Item(text=f"red {number}")
        yield PairRecord(f"p{number}", "bench", "find red", query, Item(text=f"red {number}"), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10000)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--image", type=int, default=224, help="side in pixels; 0: text alone")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments.latency, there), daemon=True)
    server.start()
    pool = ServerPool([f"http://127.0.0.1:{here.recv()}"], PoolSettings(limit=arguments.limit, timeout_s=120))
    limits = MediaLimits(28, image_min_tokens=4, image_max_tokens=768)
    blocked = [0.0]
    ask = Run.run

    async def watched(runner: Run) -> None:
        async def beat() -> None:
            while True:
                start = time.monotonic()
                await asyncio.sleep(0.001)
                blocked[0] = max(blocked[0], time.monotonic() - start - 0.001)

        task = asyncio.get_running_loop().create_task(beat())
        await ask(runner)
        task.cancel()

    Run.run = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.parquet"
        write_pairs(pairs(arguments.pairs, arguments.image), file)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        job = AnnotateJob(
            files=[file],
            out=Path(folder) / "out",
            settings=TcotSettings(),
            prompts=TcotPrompts("qwen2_vl", "compact", False, limits),
            backend=ServerBackend(pool, "qwen2_vl"),
            how=RunSettings(arguments.limit, arguments.threads),
        )
        start = time.monotonic()
        job.run(say=lambda line: None)
        seconds = time.monotonic() - start
        counts = json.loads((job.out / "data_card.json").read_text())["annotation"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    requests = counts["replies"]
    best = math.ceil(requests / arguments.limit) * arguments.latency
    print("| requests | limit | at best s | whole job s | requests/s | blocked ms | peak MB | growth MB |")
    print("|" + "---|" * 8)
    print(
        f"| {requests} | {arguments.limit} | {best:.1f} | {seconds:.1f} | {requests / seconds:.0f} | "
        f"{1000 * blocked[0]:.0f} | {peak:.0f} | {peak - before:.0f} |"
    )
    server.terminate()


if __name__ == "__main__":
    main()
