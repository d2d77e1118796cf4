# SPDX-License-Identifier: Apache-2.0
"""`embedrl serve` without thinking against the bare vLLM pooling server, with the same Embedder and the same requests.

`python benchmarks/bench_serve.py [--clients 500] [--requests 1000] [--rounds 3]` prints a markdown table.

Both servers run; in each round one is asked, then the other, with inputs of the round (so that no cache knows them):
texts, and every second with a picture of a size that the model reads as it is. A client sends its next request when it
has its answer. Every answer is compared with the library's vector of its input. Bar: 1.2 times vLLM's wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.platforms.ports import free_port
from embedrl_verl.serving.vllm import image_part
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model

BAR, SAME, SIDE, HOST = 1.2, 0.999, 112, "127.0.0.1"
WORDS = ["heron", "river", "stone", "bridge", "lamp", "morning", "engine", "letter", "harbour", "winter"]
TOKENS = {f"{kind}_{end}_tokens": size for kind in ("image", "frame") for end, size in (("min", 4), ("max", 64))}
SETTINGS = [f"embedrl.embedder.{name}={value}" for name, value in TOKENS.items()]
Input = dict[str, Any]


def draw_inputs(count: int, seed: int) -> list[Input]:
    """Inputs as the library takes them; no two are equal."""
    rng, found = np.random.default_rng(seed), list[Input]()
    for i in range(count):
        one: Input = {"text": f"{seed}-{i} " + " ".join(rng.choice(WORDS, 4 + i % 30))}
        if i % 2:
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            one["image"] = Image.fromarray(noise).resize((SIDE, SIDE))
        found.append(one)
    return found


def request_of(one: Input) -> dict[str, Any]:
    """The body that both servers take."""
    parts = [image_part(one["image"])] if "image" in one else []
    content = [*parts, {"type": "text", "text": one["text"]}]
    return {"messages": [{"role": "user", "content": content}], "encoding_format": "base64"}


async def ask(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float], np.ndarray]:
    """Seconds in all and of each request, and the vectors, float32 (n, D)."""
    seconds, vectors = [0.0] * len(bodies), [b""] * len(bodies)
    left = iter(range(len(bodies)))
    timeout, places = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(timeout=timeout, connector=places, raise_for_status=True) as session:

        async def client() -> None:
            for i in left:
                start = time.perf_counter()
                async with session.post(f"{url}/v1/embeddings", json=bodies[i]) as answer:
                    (item,) = (await answer.json())["data"]
                seconds[i] = time.perf_counter() - start
                vectors[i] = base64.b64decode(item["embedding"])

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begin, seconds, np.stack([np.frombuffer(one, "<f4") for one in vectors])


def start_vllm(folder: Path, embedder: Path) -> ServerProcess:
    """As `embedrl serve-embedder` starts it, without its middleware."""
    config = EmbedderConfig(path=str(embedder), dtype="float32", **TOKENS)
    processor = processor_for(config, max_frames=8)
    (folder / "template.jinja").write_text(prompt_template(processor))
    arguments, port = server_arguments(config, processor, on_cpu=True), free_port()
    command = server_command(arguments, folder / "template.jinja", host=HOST, port=port)
    return ServerProcess(
        command, {**os.environ, **CPU_ENV}, f"http://{HOST}:{port}", folder / "vllm.log", startup_s=600
    )


def main(argv: list[str] | None = None) -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=1000, help="of a round, to each server")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_model(folder / "model" / "embedder" / "huggingface")
        embedder = folder / "embedder"
        export_checkpoint(str(folder / "model" / "embedder"), str(embedder))
        run = [
            sys.executable,
            "-m",
            "embedrl_verl.cli",
            "serve",
            "--embedder",
            str(embedder),
            "--device",
            "cpu",
            "--port",
            "0",
        ]
        vllm = start_vllm(folder, embedder)
        ours = subprocess.Popen(
            [*run, "--set", *SETTINGS], env={**os.environ, **CPU_ENV}, stdout=subprocess.PIPE, text=True
        )
        try:
            assert ours.stdout is not None
            urls = {"embedrl serve": ours.stdout.readline().split()[-1].removesuffix("/v1/embeddings")}
            vllm.wait_ready()
            urls["vLLM"] = vllm.url
            library = EmbedRLModel.from_pretrained(str(embedder), settings=SETTINGS, device="cpu")
            processes = {"embedrl serve": ours.pid, "vLLM": vllm._child.pid}
            lines = measure(urls, processes, library, given.clients, given.requests, given.rounds)
        finally:
            ours.terminate()
            ours.wait()
            vllm.stop()
    print("\n".join(lines))


def cpu_seconds(process: int) -> float:
    """Of a process and what it has started."""
    root = psutil.Process(process)
    return sum(sum(one.cpu_times()[:2]) for one in (root, *root.children(recursive=True)))


def measure(
    urls: dict[str, str],
    processes: dict[str, int],
    library: EmbedRLModel,
    clients: int,
    requests: int,
    rounds: int,
) -> list[str]:
    """The table; raises if an answer is not the library's vector."""
    walls: dict[str, list[float]] = {name: [] for name in urls}
    latencies: dict[str, list[float]] = {name: [] for name in urls}
    cpu = dict.fromkeys(urls, 0.0)
    lowest = dict.fromkeys(urls, 1.0)
    for number in range(rounds + 1):  # the first warms up
        inputs = draw_inputs(requests if number else 64, number)
        want = library.encode_query(inputs, think="never")
        bodies = list(map(request_of, inputs))
        for name, url in urls.items():
            before = cpu_seconds(processes[name])
            wall, seconds, got = asyncio.run(ask(url, bodies, clients))
            lowest[name] = min(lowest[name], float((got * want).sum(1).min()))
            if number:
                cpu[name] += cpu_seconds(processes[name]) - before
                walls[name].append(wall)
                latencies[name] += seconds
    ratios = [mine / theirs for mine, theirs in zip(walls["embedrl serve"], walls["vLLM"], strict=True)]
    lines = [
        f"{clients} clients, {requests} requests a round, {rounds} rounds in turn",
        "",
        "| server | requests a second | p50 s | p99 s | CPU ms a request | lowest cosine to the library |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in urls:
        p50, p99 = np.quantile(latencies[name], [0.5, 0.99])
        spent = 1e3 * cpu[name] / requests / rounds
        rate = requests * rounds / sum(walls[name])
        lines.append(f"| {name} | {rate:.1f} | {p50:.2f} | {p99:.2f} | {spent:.1f} | {lowest[name]:.6f} |")
    told = ", ".join(f"{one:.2f}" for one in ratios)
    lines += ["", f"Wall time over vLLM's: median {statistics.median(ratios):.2f} (rounds: {told}); bar {BAR}."]
    if min(lowest.values()) < SAME:
        raise RuntimeError("\n".join([*lines, f"an answer is not the library's vector (cosine below {SAME})"]))
    return lines


if __name__ == "__main__":
    main()
