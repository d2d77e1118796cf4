# SPDX-License-Identifier: Apache-2.0
"""The contrastive step: two passes on verl's engine against the plain step and sentence-transformers' cached loss.

`python benchmarks/bench_contrastive.py [--out FILE]` prints two markdown tables: two passes over batches of several
sizes whose rows are all alike (so that micro-batches are, too), and the three ways over one batch of mixed rows. Every
measurement is a process of its own, with the same model, items and optimizer:

- two passes: `two_pass_step`, as stage 1 takes it (engine, FSDP2 of one rank, micro-batches under a token budget);
- plain: one forward and one backward pass over the whole batch, AdamW;
- sentence-transformers: `CachedMultipleNegativesRankingLoss` in both directions over its own Transformer module, with
  the same prompts, and the number of rows in a mini-batch that fills our token budget on average.

Memory is the process's peak above what it holds with the batch encoded; gradients and optimizer state are in it. Time
is the best of several steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_embedding import make_items, sentence_transformer  # a script: its own folder is on the path

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder import Embedder, EmbedInput, build_messages
from recipes.tiny_digits.models import build_tiny_model

LIMITS = MediaLimits(28, 1, 64, 1, 64)
TEMPERATURE = 0.05
LEARNING_RATE = 1e-5
WAYS = ("two passes", "plain", "sentence-transformers")
ALIKE = "two passes, rows alike"


def peak_mb() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """Resident size of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def inputs_of(pairs: int, *, alike: bool = False) -> tuple[list[EmbedInput], list[EmbedInput]]:
    """Queries (text, one picture, three pictures; half with T-CoT and crop) and targets of the same mix.

    With `alike` all of them have three pictures, T-CoT and crop, so that micro-batches of all batch sizes are the same.
    """
    items = make_items(12 * pairs if alike else 2 * pairs, 28)
    if alike:
        items = [
            replace(item, item=replace(item.item, text="digits"))
            for item in items
            if item.tcot and len(item.item.images) == 3
        ]
    return items[:pairs], items[pairs : 2 * pairs]


def two_passes(checkpoint: str, pairs: int, budget: int, *, alike: bool = False) -> tuple[Callable[[], float], Any]:
    """The step of stage 1 on one rank."""
    from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
    from embedrl_verl.data.identity import ContentId
    from embedrl_verl.embedder.processor import processor_for
    from embedrl_verl.embedder.worker import EmbedderWorker, worker_config
    from embedrl_verl.stage1.__main__ import one_rank
    from embedrl_verl.stage1.rows import EncodedPair, rows_of_pairs
    from embedrl_verl.stage1.step import two_pass_step

    one_rank()
    train = EmbedderTrainConfig(
        enable=True,
        lr=LEARNING_RATE,
        warmup_steps=0,
        temperature=TEMPERATURE,
        max_tokens_per_gpu=budget,
        gradient_checkpointing=False,
    )
    config = EmbedderConfig(
        path=checkpoint,
        dtype="float32",
        max_tokens_per_gpu=budget,
        image_min_tokens=1,
        image_max_tokens=64,
        frame_min_tokens=1,
        frame_max_tokens=64,
        train=train,
    )
    processor = processor_for(config)
    encode = processor.encode
    encoded = [
        EncodedPair(encode(q), encode(t), (), (ContentId(i, i),))
        for i, (q, t) in enumerate(zip(*inputs_of(pairs, alike=alike), strict=True))
    ]
    rows = rows_of_pairs(encoded, range(pairs))
    worker = EmbedderWorker(worker_config(config, ranks_per_node=1))
    worker.reset()
    return lambda: two_pass_step(worker, rows, train)["loss"], sum(len(row) for row in rows.rows) / len(rows.rows)


def plain(checkpoint: str, pairs: int, budget: int) -> tuple[Callable[[], float], Any]:
    """One pass over everything."""
    from embedrl_verl.embedder import info_nce
    from embedrl_verl.embedder.batching import pack_rows
    from embedrl_verl.embedder.model import embed_packed

    embedder = Embedder.from_pretrained(checkpoint, limits=LIMITS)
    queries, targets = inputs_of(pairs)
    rows = [embedder.processor.encode(one) for one in queries + targets]
    optimizer = torch.optim.AdamW(embedder.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def step() -> float:
        vectors = embed_packed(embedder.model.model, pack_rows(rows))
        loss = info_nce(vectors[:pairs], vectors[pairs:], temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(embedder.model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, None


def cached_loss(checkpoint: str, pairs: int, budget: int) -> tuple[Callable[[], float], Any]:
    """sentence-transformers' GradCache on the same prompts."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    embedder = Embedder.from_pretrained(checkpoint, limits=LIMITS)
    model = sentence_transformer(checkpoint, embedder)
    sides = [[build_messages(one.item, one.tcot, one.evidence) for one in side] for side in inputs_of(pairs)]
    mean = sum(len(embedder.processor.encode(one)) for side in inputs_of(min(pairs, 48)) for one in side)
    mean //= 2 * min(pairs, 48)
    features = [model.preprocess(side) for side in sides]
    loss_module = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / TEMPERATURE,
        mini_batch_size=max(1, budget // mean),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_module([dict(feature) for feature in features], None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, None


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One way in this process: loss of the first step, seconds, peak MiB above the encoded batch."""
    torch.set_num_threads(arguments.threads)
    make: dict[str, Callable[..., Any]] = {
        "two passes": two_passes,
        ALIKE: partial(two_passes, alike=True),
        "plain": plain,
        "sentence-transformers": cached_loss,
    }
    step, _ = make[arguments.way](arguments.checkpoint, arguments.pairs, arguments.budget)
    before = resident_mb()
    loss, seconds = step(), float("inf")
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step()
        seconds = min(seconds, time.perf_counter() - start)
    return {"loss": loss, "seconds": seconds, "mb": peak_mb() - before}


def run(way: str, pairs: int, checkpoint: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--pairs", str(pairs), "--checkpoint", checkpoint]
    command += ["--budget", str(arguments.budget), "--threads", str(arguments.threads), "--steps", str(arguments.steps)]
    # One arena: freed memory of one micro-batch is used by the next, as a device's allocator would.
    env = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": str(arguments.threads), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}, {pairs} pairs: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a micro-batch, padding included")
    parser.add_argument("--compare", type=int, default=128, help="pairs of the comparison of the three ways")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=(*WAYS, ALIKE), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        arguments.pairs = arguments.pairs[0]
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden_size": arguments.hidden_size, "num_layers": arguments.num_layers}
        checkpoint = str(build_tiny_model(folder, **size))
        flat = {pairs: run(ALIKE, pairs, checkpoint, arguments) for pairs in arguments.pairs}
        ways = {way: run(way, arguments.compare, checkpoint, arguments) for way in WAYS}
    low = min(found["mb"] for found in flat.values())
    lines = [
        "Two passes, rows alike:",
        "",
        "| pairs | seconds a step | pairs a second | peak MiB | times the smallest |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {pairs} | {found['seconds']:.2f} | {pairs / found['seconds']:.1f} | {found['mb']:.0f} | "
        f"{found['mb'] / low:.2f} |"
        for pairs, found in flat.items()
    ]
    base = ways["two passes"]
    lines += ["", f"{arguments.compare} pairs, mixed rows:", ""]
    lines += ["| way | loss | seconds a step | times two passes | peak MiB |", "|---|---|---|---|---|"]
    lines += [
        f"| {way} | {found['loss']:.6f} | {found['seconds']:.2f} | {found['seconds'] / base['seconds']:.2f} | "
        f"{found['mb']:.0f} |"
        for way, found in ways.items()
    ]
    growth = max(found["mb"] for found in flat.values()) / low
    lines += [
        "",
        f"Micro-batches of {arguments.budget} tokens, {arguments.threads} thread(s), float32, hidden size "
        f"{arguments.hidden_size}, {arguments.num_layers} layers.",
        f"Peak memory over {min(flat)} to {max(flat)} pairs: {growth:.2f} (target: 1.10).",
        f"Two passes take {base['seconds'] / ways['plain']['seconds']:.2f} times the plain step (target: 1.4).",
        f"sentence-transformers takes {ways['sentence-transformers']['seconds'] / base['seconds']:.2f} times as long; "
        f"its loss differs by {abs(ways['sentence-transformers']['loss'] - base['loss']):.1e} (target: 1e-5).",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"# The contrastive step\n\n`python benchmarks/bench_contrastive.py`\n\n{text}\n")


if __name__ == "__main__":
    main()
