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
differ in length, as they do in a run. What streaming saves depends on when rollouts end and on how busy the server is;
the output says both. `--max-num-seqs` (vLLM's places) spreads the ends over a step, or lets rollouts end together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
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
from tiny_run import overrides

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command
from embedrl_verl.embedder.served.requests import PATH
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.platforms.ports import free_port
from embedrl_verl.progress import read_metrics
from embedrl_verl.rewards.dump import dump_name
from embedrl_verl.serving import PoolSettings, ServerPool
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.settings import tiny_limits

BAR = 0.30
WARM_UP = 1
MAX_MODEL_LEN = 1024
HOST = "127.0.0.1"
CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")  # routes of vLLM's development mode


@dataclass(frozen=True)
class Sent:
    """One request of the run: when it came and was answered, by `time.monotonic`, and its body."""

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


def arguments_of_run(args: argparse.Namespace, folder: Path, url: str) -> list[str]:
    """The run of the recipe, with an embedding server."""
    return [
        *overrides(args.inputs.resolve(), args.steps, args.pairs, args.rollouts),
        f"actor_rollout_ref.rollout.max_num_seqs={args.max_num_seqs}",
        "embedrl.embedder.backend=server",
        f"embedrl.embedder.server.urls=[{url}]",
        f"embedrl.embedder.server.max_model_len={MAX_MODEL_LEN}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
    ]


async def record(args: argparse.Namespace, folder: Path, server: str) -> list[list[Sent]]:
    """Requests of each step after the warm-up, by time."""
    recorder, port = Recorder(server), free_port(HOST)
    runner = await recorder.serve(port)
    environment = {**os.environ, **CPU_ENV, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    arguments = arguments_of_run(args, folder, f"http://{HOST}:{port}")
    with (folder / "run.log").open("w") as log:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedrl_verl.train", *arguments),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            code = await run.wait()
        finally:
            if run.returncode is None:
                run.kill()
            await recorder.close()
            await runner.cleanup()
    if code:
        raise SystemExit(f"the run ended with status {code}:\n{(folder / 'run.log').read_text()[-4000:]}")
    rows = 2 * args.pairs * args.rollouts
    # The handshake's probes come first; a step's rows are all there before the next one's begin.
    sent = sorted(recorder.sent, key=lambda one: one.came)[-args.steps * rows :]
    return [sent[first : first + rows] for first in range(WARM_UP * rows, args.steps * rows, rows)]


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


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _sent_by(steps: list[list[Sent]], share: float) -> float:
    """The part of a step, from its first request to its last, in which this share of them is sent; median."""
    found = []
    for step in steps:
        first, last = step[0].came, step[-1].came
        found.append((step[math.ceil(share * len(step)) - 1].came - first) / (last - first))
    return statistics.median(found)


async def measure(args: argparse.Namespace, folder: Path) -> None:
    """Record, play back, print."""
    limits = {name: value for name, value in asdict(tiny_limits("qwen2_vl")).items() if name.endswith("_tokens")}
    config = EmbedderConfig(
        path=str(args.inputs.resolve() / "embedder"),
        backend="server",
        dtype="float32",
        server=EmbedderServerConfig(max_model_len=MAX_MODEL_LEN),
        **limits,
    )
    processor = processor_for(config)
    template, port = folder / "template.jinja", free_port(HOST)
    template.write_text(prompt_template(processor))
    command = server_command(server_arguments(config, processor, on_cpu=True), template, host=HOST, port=port)
    url = f"http://{HOST}:{port}"
    environment = {**os.environ, **CPU_ENV, "VLLM_SERVER_DEV_MODE": "1"}
    server = ServerProcess(command, environment, url, folder / "server.log", startup_s=900)
    try:
        server.wait_ready()
        steps = await record(args, folder, url)
        times: dict[str, list[float]] = {"streaming": [], "barrier": []}
        async with ServerPool([url], PoolSettings(limit=args.limit)) as pool:
            for _ in range(args.rounds):
                for step in steps:
                    for way, found in times.items():
                        found.append(await play_back(pool, step, streaming=way == "streaming"))
    finally:
        server.stop()
    metrics = [one for step, one in sorted(read_metrics(folder / "metrics.jsonl").items()) if step > WARM_UP]
    report(args, folder, steps, times, metrics)


def report(
    args: argparse.Namespace,
    folder: Path,
    steps: list[list[Sent]],
    times: dict[str, list[float]],
    metrics: list[dict[str, float]],
) -> None:
    """Print what was measured."""
    parts = {name: [one[f"timing_s/{name}"] for one in metrics] for name in ("reward_stage", "reward_embed")}
    rest = statistics.median(parts["reward_stage"])
    live = [max(one.answered for one in step) - step[-1].came for step in steps]
    # A step's dump is written at the end of its reward stage.
    clock = time.time() - time.monotonic()
    dumps = [folder / "rollouts" / dump_name(WARM_UP + 1 + i) for i in range(len(steps))]
    whole = [dump.stat().st_mtime - clock - step[-1].came for dump, step in zip(dumps, steps, strict=True)]
    took = [step[-1].came - step[0].came for step in steps]
    barrier = statistics.median(times["barrier"])
    print(
        f"{len(steps[0])} rollouts a step, at most {args.max_num_seqs} at once, {len(steps)} recorded steps, each "
        f"played back {args.rounds} time(s);\nmedians in seconds (least to most); {os.cpu_count()} cores\n"
    )
    print(f"tokens of a rollout: {statistics.median(one['response_length/mean'] for one in metrics):.0f}")
    print(f"first to last rollout: {_spread(took)}")
    ended = ", ".join(f"{share:.0%} by {_sent_by(steps, share):.2f}" for share in (0.25, 0.5, 0.75, 0.9))
    print(f"rollouts that have ended, by part of that time: {ended}")
    print(f"embedding all rows takes the server {barrier / statistics.median(took):.2f} of that time")
    print(f"rest of the reward stage, as in the run: {_spread(parts['reward_stage'])},")
    print(f"of which reading vectors {_spread(parts['reward_embed'])}\n")
    print("| rows are embedded | last rollout to last vector | with the rest of the stage |")
    print("|---|---|---|")
    totals = {way: statistics.median(found) + rest for way, found in times.items()}
    for way, name in (("streaming", "as rollouts finish"), ("barrier", "at the barrier")):
        print(f"| {name} | {_spread(times[way])} | {totals[way]:.3f} |")
    print(f"| as rollouts finish, in the run itself, server on the same cores | {_spread(live)} | |")
    print("\nlast rollout to the end of the reward stage in the run itself, with storing and finding rows in")
    print(f"TransferQueue (verl's own, and the vectors): {_spread(whole)}")
    ratio = totals["streaming"] / totals["barrier"]
    print(f"\nstreaming / barrier: {ratio:.3f} (bar: below {BAR:.2f}, {'met' if ratio < BAR else 'NOT met'})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="rollouts at once (vLLM's places)")
    parser.add_argument("--steps", type=int, default=4, help=f"of the run, of which {WARM_UP} warm up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=256, help="requests in flight, as embedrl.embedder.server.limit")
    parser.add_argument("--keep", type=Path, help="folder for the logs and metrics of run and server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        asyncio.run(measure(args, folder))


if __name__ == "__main__":
    main()
