# SPDX-License-Identifier: Apache-2.0
"""The reward stage after the last rollout: rows embedded as rollouts finish, against all of them at the barrier.

Two stock vLLM servers, as in a run with `embedrl.embedder.backend=server`: one writes the T-CoTs of a step (all prompts
and rollouts at once, as agent loops send them), one embeds. Rounds alternate; like a training batch, the pairs of a
round are of one data source, and each round takes the next one. In both ways a row is parsed, its evidence cut and its
request made as soon as its rollout is there; the one sends the request at once, the other when all are there. The clock
runs from the last rollout's answer to the rewards.

    python benchmarks/bench_streaming.py --inputs RUN_FOLDER

`RUN_FOLDER` is the output of recipes/run_egrl_tiny_cpu.sh: trained models and data, so that rollouts take as long, and
differ in length, as they do in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.embedder.served.client import ServedEmbedder
from embedrl_verl.embedder.served.command import server_arguments, server_command, server_options
from embedrl_verl.embedder.served.handshake import check_servers
from embedrl_verl.embedder.served.process import ServerProcess
from embedrl_verl.embedder.served.requests import content_part
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.functions.no_judge import compute_score
from embedrl_verl.serving import PoolSettings, ServerPool
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.tiny.contrastive import embed_input
from embedrl_verl.tiny.digits import Sample, read_samples
from embedrl_verl.tiny.reasoner import TINY_LIMITS

BAR = 0.30
MAX_TOKENS = 96
ENV = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Round:
    """Seconds of one step: until the last rollout, from there to the rewards, and rows without a vector."""

    rollouts_s: float
    stage_s: float
    failed: int


@dataclass(frozen=True)
class Row:
    """One rollout to be."""

    sample: Sample
    side: Side
    pair: int
    rollout: int


class Step:
    """A step's rows and the two servers."""

    def __init__(self, rows: list[Row], reasoner: ServerPool, embedder: ServedEmbedder) -> None:
        self._rows, self._reasoner, self._embedder = rows, reasoner, embedder
        self._prompts: dict[tuple[int, Side], dict[str, Any]] = {}
        for row in rows:
            if (row.pair, row.side) not in self._prompts:
                self._prompts[row.pair, row.side] = _chat(row)

    async def run(self, *, streaming: bool) -> Round:
        """Roll out, embed in one of the two ways, and reward."""
        barrier = asyncio.Event()
        answered = 0
        last = 0.0
        loop = asyncio.get_running_loop()
        texts: dict[int, str] = {}

        async def one(index: int, row: Row) -> Any:
            nonlocal answered, last
            answer = await self._reasoner.post("/v1/chat/completions", self._prompts[row.pair, row.side])
            answered, last = answered + 1, time.perf_counter()
            if answered == len(self._rows):
                barrier.set()
            texts[index] = answer["choices"][0]["message"]["content"] or ""
            inputs = await loop.run_in_executor(None, embed_input, row.sample, row.side, texts[index])
            request = await loop.run_in_executor(None, self._embedder.prepare, inputs)
            if not streaming:
                await barrier.wait()
            return await self._embedder.embed(request)

        start = time.perf_counter()
        results = await asyncio.gather(*(one(i, row) for i, row in enumerate(self._rows)), return_exceptions=True)
        self._reward(results, texts)
        end = time.perf_counter()
        return Round(last - start, end - last, sum(not isinstance(result, torch.Tensor) for result in results))

    def _reward(self, results: list[Any], texts: dict[int, str]) -> None:
        width = next(len(result) for result in results if isinstance(result, torch.Tensor))
        missing = torch.full((width,), torch.nan)
        valid = torch.tensor([isinstance(result, torch.Tensor) for result in results])
        pair = torch.tensor([row.pair for row in self._rows])
        batch = RewardBatch.build(
            side=torch.tensor([SIDES.index(row.side) for row in self._rows]),
            pair=pair,
            rollout=torch.tensor([row.rollout for row in self._rows]),
            content=pair,
            tcots=[parse_tcot(texts.get(i, "")) for i in range(len(self._rows))],
            required=["text_keywords"] * len(self._rows),
            embeddings=torch.stack([result if isinstance(result, torch.Tensor) else missing for result in results]),
            valid=valid,
        )
        compute_score(batch)


def _chat(row: Row) -> dict[str, Any]:
    """The rollout's request: the run's prompt with its media, sampling as in training."""
    messages = prompt_messages(
        row.sample.record, row.side, family="qwen2_vl", style="compact", few_shot=False, max_frames=8
    )
    images, videos = load_prompt_media(messages, TINY_LIMITS, None)
    media = {"image": iter(images or ()), "video": (video.permute(0, 2, 3, 1).numpy() for video, _ in videos or ())}
    turns = []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [
                content_part({**part, part["type"]: next(media[part["type"]])} if part["type"] in media else part)
                for part in parts
            ]
        turns.append({"role": message["role"], "content": parts})
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": MAX_TOKENS}
    if videos:
        options["media_io_kwargs"] = {"video": {"num_frames": -1}}
    return {"messages": turns, **options}


def _serve(arguments: list[str], port: int, folder: Path, name: str) -> ServerProcess:
    process = ServerProcess(
        server_command(arguments),
        {**os.environ, **ENV},
        f"http://127.0.0.1:{port}",
        folder / f"{name}.log",
        startup_s=900,
        name=f"{name} server",
    )
    process.wait_ready()
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _steps(world: Path, pairs: int, rollouts: int) -> list[list[Row]]:
    """One batch of rows for each data source."""
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in read_samples(world / "train.parquet"):
        by_source[sample.record.data_source].append(sample)
    return [
        [
            Row(sample, side, pair, g)
            for pair, sample in enumerate(some[:pairs])
            for side in SIDES
            for g in range(rollouts)
        ]
        for some in by_source.values()
    ]


def measure(inputs: Path, pairs: int, rollouts: int, rounds: int, limit: int) -> dict[str, list[Round]]:
    """Rounds by way, the first of each (which warms up) left out."""
    limits = {name: value for name, value in asdict(TINY_LIMITS).items() if name.endswith("_tokens")}
    config = EmbedderConfig(path=str(inputs / "embedder"), backend="server", dtype="float32", **limits)
    processor = processor_for(config)
    section = EmbedderServerConfig(max_model_len=1024, limit=limit)
    config = replace(config, server=section)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = server_options(config, processor, on_cpu=True)
        template = folder / "template.jinja"
        template.write_text(options.template)
        ports = _free_port(), _free_port()
        embedding = server_arguments(options, template, host="127.0.0.1", port=ports[0])
        writing = ["--model", str(inputs / "sft"), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        writing += ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--disable-uvicorn-access-log"]
        writing += ["--host", "127.0.0.1", "--port", str(ports[1])]
        servers: list[ServerProcess] = []
        try:
            servers.append(_serve(embedding, ports[0], folder, "embedder"))
            servers.append(_serve(writing, ports[1], folder, "reasoner"))
            urls = [server.url for server in servers]
            check_servers(config, processor, urls[:1])
            served = ServedEmbedder(replace(config, server=replace(section, urls=(urls[0],))), processor)
            reasoner = ServerPool([urls[1]], PoolSettings(limit=len(SIDES) * pairs * rollouts, timeout_s=600))
            steps = [Step(rows, reasoner, served) for rows in _steps(inputs / "world", pairs, rollouts)]

            async def run() -> dict[str, list[Round]]:
                found: dict[str, list[Round]] = {"streaming": [], "barrier": []}
                async with reasoner, served.pool:
                    for number in range(rounds + 1):
                        for way in found:
                            step = steps[number % len(steps)]
                            found[way].append(await step.run(streaming=way == "streaming"))
                return {way: results[1:] for way, results in found.items()}

            return asyncio.run(run())
        finally:
            for server in servers:
                server.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=int, default=64)
    args = parser.parse_args()
    found = measure(args.inputs.resolve(), args.pairs, args.rollouts, args.rounds, args.limit)
    rows = len(SIDES) * args.pairs * args.rollouts
    print(f"{rows} rollouts a step, {args.rounds} rounds each, medians in seconds (least to most)\n")
    print("| rows are embedded | until the last rollout | from there to the rewards | rows without a vector |")
    print("|---|---|---|---|")
    medians = {}
    for way, results in found.items():
        cells = []
        for values in ([one.rollouts_s for one in results], [one.stage_s for one in results]):
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        medians[way] = statistics.median(one.stage_s for one in results)
        name = "as they come" if way == "streaming" else "at the barrier"
        print(f"| {name} | {cells[0]} | {cells[1]} | {sum(one.failed for one in results)} |")
    ratio = medians["streaming"] / medians["barrier"]
    print(f"\nstreaming / barrier: {ratio:.3f} (bar: below {BAR:.2f}, {'met' if ratio < BAR else 'NOT met'})")


if __name__ == "__main__":
    main()
