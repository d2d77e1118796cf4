# SPDX-License-Identifier: Apache-2.0
"""The reward stage after the last rollout: rows embedded as rollouts finish, against all of them at the barrier.

1. An EG-RL run with `embedrl.embedder.backend=server` trains for some steps; what it sends to its embedding server is
   recorded: every row's request, and when in its step it was sent.
2. Each recorded step is played back against the same server, which now has the machine to itself, as a server in a pool
   of its own has: once with every request at its own time, once with all of them when the last rollout is there. The
   clock runs from the last rollout to the last vector. What the rest of the reward stage took in the run is added to
   both. The server's caches are emptied before each.

    python benchmarks/bench_streaming.py --inputs RUN_FOLDER

`RUN_FOLDER` is the output of recipes/run_egrl_tiny_cpu.sh: trained models and data, so that rollouts take as long, and
differ in length, as they do in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.embedder.served.command import server_arguments, server_command, server_options
from embedrl_verl.embedder.served.process import ServerProcess
from embedrl_verl.embedder.served.requests import PATH
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.progress import read_metrics
from embedrl_verl.serving import PoolSettings, ServerPool
from embedrl_verl.tiny.reasoner import TINY_LIMITS

BAR = 0.30
WARM_UP = 2
MAX_MODEL_LEN = 1024
HOST = "127.0.0.1"
CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")  # routes of vLLM's development mode
ENV = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Sent:
    """One request of the run: seconds at which it came and was answered, and its body."""

    came: float
    answered: float
    body: bytes


class Recorder:
    """Passes requests on to the server, and keeps those for vectors."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.sent: list[Sent] = []

    async def serve(self, port: int) -> web.AppRunner:
        """Listen until the runner is cleaned up."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        # The server closes idle connections after 5 s, and one must not be used while it does.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600), connector=connector)
        return runner

    async def close(self) -> None:
        """End the connections to the server."""
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.Response:
        came, body = time.monotonic(), await request.read()
        headers = {"Content-Type": request.content_type}
        async with self._session.request(
            request.method, self._url + request.path, data=body or None, headers=headers
        ) as answer:
            found = await answer.read()
            if request.path == PATH and answer.status == 200:
                self.sent.append(Sent(came, time.monotonic(), body))
            return web.Response(body=found, status=answer.status, content_type=answer.content_type)


def overrides(inputs: Path, folder: Path, url: str, steps: int, pairs: int, rollouts: int) -> list[str]:
    """The run of the recipe, with an embedding server."""
    limits = {name: value for name, value in asdict(TINY_LIMITS).items() if name.endswith("_tokens")}
    return [
        "platform=cpu",
        f"data.train_files={inputs / 'world' / 'train.parquet'}",
        f"data.val_files={inputs / 'world' / 'heldout.parquet'}",
        f"data.train_batch_size={2 * pairs}",
        "data.max_prompt_length=256",
        "data.max_response_length=96",
        "data.seed=0",
        "data.embedrl.prompt_style=compact",
        *(f"{part}.{name}={value}" for part in ("data.embedrl", "embedrl.embedder") for name, value in limits.items()),
        f"actor_rollout_ref.model.path={inputs / 'sft'}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={pairs}",
        f"actor_rollout_ref.rollout.n={rollouts}",
        "actor_rollout_ref.rollout.max_model_len=512",
        f"embedrl.embedder.path={inputs / 'embedder'}",
        "embedrl.embedder.backend=server",
        f"embedrl.embedder.server.urls=[{url}]",
        f"embedrl.embedder.server.max_model_len={MAX_MODEL_LEN}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]


async def record(inputs: Path, folder: Path, server: str, steps: int, pairs: int, rollouts: int) -> list[list[Sent]]:
    """Requests of each step after the warm-up, by time."""
    recorder, port = Recorder(server), _free_port()
    runner = await recorder.serve(port)
    environment = {**os.environ, **ENV, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    arguments = overrides(inputs, folder, f"http://{HOST}:{port}", steps, pairs, rollouts)
    with (folder / "run.log").open("w") as log:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedrl_verl.train", *arguments),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        code = await run.wait()
    await recorder.close()
    await runner.cleanup()
    if code:
        raise SystemExit(f"the run ended with status {code}:\n{(folder / 'run.log').read_text()[-4000:]}")
    rows = 2 * pairs * rollouts
    # The handshake's probes come first; a step's rows are all there before the next one's begin.
    sent = sorted(recorder.sent, key=lambda one: one.came)[-steps * rows :]
    return [sent[first : first + rows] for first in range(WARM_UP * rows, steps * rows, rows)]


async def play_back(pool: ServerPool, step: list[Sent], *, streaming: bool) -> float:
    """Seconds from the last rollout of the step to its last vector."""
    for cache in CACHES:
        await pool.post(cache, {})
    began = step[0].came if streaming else step[-1].came
    payloads = [json.loads(one.body) for one in step]
    start = time.monotonic()

    async def one(sent: Sent, payload: dict[str, Any]) -> None:
        await asyncio.sleep(max(start + sent.came - began - time.monotonic(), 0))
        answer = await pool.post(PATH, payload)
        assert answer["data"][0]["embedding"], answer

    await asyncio.gather(*(one(sent, payload) for sent, payload in zip(step, payloads, strict=True)))
    return time.monotonic() - start - (step[-1].came - began)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


async def measure(args: argparse.Namespace, folder: Path) -> None:
    """Record, play back, print."""
    inputs = args.inputs.resolve()
    limits = {name: value for name, value in asdict(TINY_LIMITS).items() if name.endswith("_tokens")}
    config = EmbedderConfig(
        path=str(inputs / "embedder"),
        backend="server",
        dtype="float32",
        server=EmbedderServerConfig(max_model_len=MAX_MODEL_LEN),
        **limits,
    )
    options = server_options(config, processor_for(config), on_cpu=True)
    template, port = folder / "template.jinja", _free_port()
    template.write_text(options.template)
    command = server_command(server_arguments(options, template, host=HOST, port=port))
    url = f"http://{HOST}:{port}"
    environment = {**os.environ, **ENV, "VLLM_SERVER_DEV_MODE": "1"}
    server = ServerProcess(command, environment, url, folder / "server.log", startup_s=900)
    try:
        server.wait_ready()
        steps = await record(inputs, folder, url, args.steps, args.pairs, args.rollouts)
        times: dict[str, list[float]] = {"streaming": [], "barrier": []}
        async with ServerPool([url], PoolSettings(limit=args.limit)) as pool:
            for _ in range(args.rounds):
                for step in steps:
                    for way, found in times.items():
                        found.append(await play_back(pool, step, streaming=way == "streaming"))
    finally:
        server.stop()
    metrics = [one for step, one in sorted(read_metrics(folder / "metrics.jsonl").items()) if step > WARM_UP]
    rest = statistics.median(one["timing_s/reward_stage"] for one in metrics)
    live = [max(one.answered for one in step) - step[-1].came for step in steps]
    took = [step[-1].came - step[0].came for step in steps]
    rows = len(steps[0])
    print(
        f"{rows} rollouts a step, {len(steps)} recorded steps, each played back {args.rounds} times; medians in seconds"
    )
    print("(least to most)\n")
    print(f"first to last rollout: {_spread(took)}")
    print(f"rest of the reward stage (queue, reward function), as in the run: {rest:.3f}\n")
    print("| rows are embedded | last rollout to last vector | with the rest of the stage |")
    print("|---|---|---|")
    totals = {way: statistics.median(found) + rest for way, found in times.items()}
    for way, name in (("streaming", "as rollouts finish"), ("barrier", "at the barrier")):
        print(f"| {name} | {_spread(times[way])} | {totals[way]:.3f} |")
    print(f"| as rollouts finish, in the run itself, on the same cores | {_spread(live)} | |")
    ratio = totals["streaming"] / totals["barrier"]
    print(f"\nstreaming / barrier: {ratio:.3f} (bar: below {BAR:.2f}, {'met' if ratio < BAR else 'NOT met'})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help=f"of the run, of which {WARM_UP} warm up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=256, help="requests in flight, as embedrl.embedder.server.limit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(args, Path(scratch)))


if __name__ == "__main__":
    main()
