# SPDX-License-Identifier: Apache-2.0
"""Embedding throughput: batched against one request at a time and against sentence-transformers, in one run.

`python benchmarks/bench_embedding.py [--items 256] [--worker] [--out FILE]` prints a markdown table. Without
`--checkpoint` a tiny Qwen2-VL is made on the spot.

Items are what the reward stage embeds: text, one picture or three pictures, half of them with a T-CoT and one evidence
crop. Pictures already have whole visual tokens, so every way sees the same pixels, and all vectors are compared. Timed
from pictures and text to vectors, the best of several rounds that alternate between the ways:

- batched: `Embedder.embed(items)`; forward only: the same rows already encoded, as the agent loop leaves them;
- one at a time: `Embedder.embed([item])` in a loop;
- sentence-transformers `encode(messages)` with batches of 8, 32 and 128, and one message at a time. Its loader leaves
  the language part of this checkpoint newly initialised, so it is given the weights;
- worker (`--worker`, needs Ray): the whole list in one call of the verl worker group, and one call a row.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from embedrl_verl.data.media import LoadedItem, MediaLimits
from embedrl_verl.embedder import Embedder, EmbedInput, build_messages
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits.models import build_tiny_model

TCOT = (
    '<thinking>Four digits in a row. {"bbox_2d": [[0, 0, 500, 1000]]}</thinking>'
    "<rethink>The box holds the first two.</rethink><answer>4 2 0 7</answer>"
)


def make_items(count: int, side: int) -> list[EmbedInput]:
    """A third each text, one picture of 2 x 4 visual tokens, three pictures; every other one with T-CoT and a crop."""
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height * side, width * side, 3), dtype=np.uint8))

    items = []
    for i in range(count):
        images = [(), (picture(2, 4),), (picture(2, 2), picture(1, 3), picture(2, 3))][i % 3]
        loaded = LoadedItem(f"which digits are written {'here ' * (i % 9)}", "Find the same.", images, ())
        tcot = parse_tcot(TCOT) if i % 2 else None
        items.append(EmbedInput(loaded, tcot, (picture(1, 2),) if tcot else ()))
    return items


def sentence_transformer(checkpoint: str, embedder: Embedder) -> SentenceTransformer:
    """The same model, weights, prompt and pooling in sentence-transformers."""
    module = Transformer(checkpoint, processing_kwargs={"chat_template": {"continue_final_message": True}})
    module.model.load_state_dict(embedder.model.model.state_dict())
    module.processor.tokenizer.padding_side = "left"
    pooling = Pooling(module.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[module, pooling, Normalize()], device=str(embedder.model.device))


def best_times(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls of each way; the ways take turns."""
    times = {name: float("inf") for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def worker_client(checkpoint: str, budget: int) -> Any:
    """A client of a verl worker group of one rank on a fresh Ray."""
    import ray
    from omegaconf import OmegaConf
    from verl.single_controller.ray import RayResourcePool

    from embedrl_verl.config.schema import EmbedderConfig
    from embedrl_verl.embedder.client import EmbedderClient
    from embedrl_verl.embedder.worker import start_embedder_worker_group

    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    run_config = OmegaConf.create({"trainer": {"ray_wait_register_center_timeout": 300}})
    config = EmbedderConfig(path=checkpoint, dtype="float32", max_tokens_per_gpu=budget)
    pool = RayResourcePool(process_on_nodes=[1], use_gpu=True, max_colocate_count=1)
    return EmbedderClient(start_embedder_worker_group(run_config, config, pool)[0])


def main(argv: list[str] | None = None) -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--singles", type=int, default=48, help="items of the ways that take one at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a batch, padding included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", help="Qwen2-VL family generation checkpoint with <emb>")
    parser.add_argument("--worker", action="store_true", help="also through a verl worker group (starts Ray)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("VERL_PLATFORM", "cpu" if arguments.device == "cpu" else "")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or str(build_tiny_model(folder))
        embedder = Embedder.from_pretrained(checkpoint, limits=MediaLimits(28, 1, 64, 1, 64), device=arguments.device)
        items = make_items(arguments.items, 28)
        singles = items[: arguments.singles]
        rows = [embedder.processor.encode(item) for item in items]
        messages: list[Any] = [build_messages(item.item, item.tcot, item.evidence) for item in items]
        other = sentence_transformer(checkpoint, embedder)

        def encode(batch: list[Any], size: int) -> torch.Tensor:
            return other.encode(batch, batch_size=size, convert_to_tensor=True, show_progress_bar=False).cpu()

        ways: dict[str, Callable[[], Any]] = {
            "batched": lambda: embedder.embed(items, max_batch_tokens=arguments.budget),
            "batched, forward only": lambda: embedder.embed_encoded(rows, max_batch_tokens=arguments.budget),
            "one at a time": lambda: [embedder.embed([item]) for item in singles],
            **{f"sentence-transformers, {n} a batch": lambda n=n: encode(messages, n) for n in (8, 32, 128)},
            "sentence-transformers, one at a time": lambda: [encode([m], 1) for m in messages[: len(singles)]],
        }
        expected = embedder.embed(items, batch_size=1)
        worst = {"sentence-transformers": float((encode(messages, 32) * expected).sum(1).min())}
        if arguments.worker:
            client = worker_client(checkpoint, arguments.budget)
            worst["worker"] = float((client.embed(rows).vectors * expected).sum(1).min())
            ways["worker, one call"] = lambda: client.embed(rows)
            ways["worker, one call a row"] = lambda: [client.embed([row]) for row in rows[: len(singles)]]
        times = best_times(ways, arguments.rounds)

    count = {name: len(singles) if name.endswith(("at a time", "a row")) else len(items) for name in ways}
    per_item = {name: 1e3 * seconds / count[name] for name, seconds in times.items()}
    base = per_item["batched"]
    lines = [
        "| way | ms an item | items a second | times the batched time |",
        "|---|---|---|---|",
        *(f"| {name} | {ms:.2f} | {1e3 / ms:.0f} | {ms / base:.2f} |" for name, ms in per_item.items()),
    ]
    best = min(ms for name, ms in per_item.items() if name.startswith("sentence"))
    summary = [
        f"{len(items)} items, {sum(map(len, rows)) / len(rows):.0f} tokens each on average; {arguments.device}, "
        f"{arguments.threads} thread(s), batches of {arguments.budget} tokens; best of {arguments.rounds} rounds.",
        f"One at a time takes {per_item['one at a time'] / base:.1f} times the batched time (target: 10). "
        f"sentence-transformers at its best takes {best / base:.2f} times (target: at least 1).",
    ]
    if arguments.worker:
        ratio = per_item["worker, one call a row"] / per_item["worker, one call"]
        summary.append(f"A call a row to the worker takes {ratio:.1f} times one call for all rows (target: 10).")
    lowest = ", ".join(f"{name} {cosine:.6f}" for name, cosine in worst.items())
    summary.append(f"Lowest cosine to the vectors of one at a time: {lowest}.")
    text = "\n".join([*lines, "", *summary])
    print(text)
    if arguments.out:
        command = " ".join(
            argument for argument in sys.argv[1:] if argument != str(arguments.out) and argument != "--out"
        )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            f"# Embedding throughput\n\n`python benchmarks/bench_embedding.py {command}`\n\n{text}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
