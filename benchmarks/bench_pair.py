# SPDX-License-Identifier: Apache-2.0
"""`embedrl embed` against sentence-transformers' encode of the same exported Embedder, its memory, and search.

`python benchmarks/bench_pair.py [--items 200] [--vectors 10000] [--out FILE]` prints markdown tables.

1. Items a second, models loaded, from files to vectors on the disk: what the command does for its parts (think=never),
   and sentence-transformers over the same lines and pictures, written as one .npy. The two take turns, best of several
   rounds; all vectors are compared. Texts, and every fourth with a picture.
2. Peak memory of the command, for so many items and for four times as many.
3. Search of unit vectors, one query at a time: every vector compared, and the graph (FAISS' HNSW) with the share of the
   exact best ten that it finds. Vectors are drawn evenly (the hardest case: all are nearly equally far) and about
   centres, as those of a trained Embedder are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from embedrl_verl.data.media import LoadedItem
from embedrl_verl.embedder import build_messages
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.retrieval.embed import _Maker
from embedrl_verl.retrieval.index import _graph, exact
from embedrl_verl.retrieval.inputs import Inputs, Reading
from embedrl_verl.retrieval.pair import PairOptions
from recipes.tiny_digits.models import build_tiny_model

PART, BATCH, TOP = 1024, 32, 10


def write_corpus(folder: Path, count: int) -> Path:
    """Lines of texts, every fourth with a picture of 224 x 224."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with open(folder / "corpus.jsonl", "w") as file:
        for i in range(count):
            line = {"id": str(i), "text": f"document {i} " + "is written here " * (i % 9)}
            if i % 4 == 0:
                Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(folder / f"{i}.png")
                line["image"] = f"{i}.png"
            file.write(json.dumps(line) + "\n")
    return folder / "corpus.jsonl"


def encode_by_sentence_transformers(model: SentenceTransformer, corpus: Path, out: Path) -> None:
    """As a script of a user does it, a part at a time."""
    found, lines = [], corpus.read_text().splitlines()
    for start in range(0, len(lines), PART):
        messages: list[Any] = []
        for line in map(json.loads, lines[start : start + PART]):
            images = (Image.open(corpus.parent / line["image"]).convert("RGB"),) if "image" in line else ()
            messages.append(build_messages(LoadedItem(line["text"], "", images, ()), None, ()))
        found.append(model.encode(messages, batch_size=BATCH, show_progress_bar=False))
    np.save(out, np.concatenate(found))


def speed(folder: Path, embedder: Path, count: int, rounds: int) -> list[str]:
    """Table 1."""
    corpus = write_corpus(folder / "corpus", count)
    maker = _Maker(PairOptions(str(embedder), device="cpu").load("never"), Reading("target"), BATCH)
    other = SentenceTransformer(str(embedder), device="cpu")

    def embed() -> None:
        for number, part in enumerate(Inputs([str(corpus)], PART).parts):
            maker(part, folder / f"part-{number}.parquet")

    ways: dict[str, Callable[[], None]] = {
        "embedrl embed": embed,
        "sentence-transformers": lambda: encode_by_sentence_transformers(other, corpus, folder / "other.npy"),
    }
    seconds, cpu = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            cpu[name] = min(cpu[name], time.process_time() - cpu_start)
    rows = [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part)["vector"].to_pylist()]
    cosine = (np.array(rows, np.float32) * np.load(folder / "other.npy")).sum(1).min()
    ours = seconds["embedrl embed"]
    return [
        "| way | items a second | times the time of embedrl embed | CPU ms an item |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {count / value:.0f} | {value / ours:.2f} | {1e3 * cpu[name] / count:.1f} |"
            for name, value in seconds.items()
        ),
        "",
        f"{count} items; best of {rounds} rounds; lowest cosine between the two {cosine:.6f}.",
    ]


def memory(folder: Path, embedder: Path, count: int) -> list[str]:
    """Table 2."""
    lines = ["| items | peak MiB | seconds, with start |", "|---:|---:|---:|"]
    for size in (count, 4 * count):
        corpus = write_corpus(folder / f"corpus{size}", size)
        run = [sys.executable, "-m", "embedrl_verl.cli", "embed", str(corpus), "--embedder", str(embedder)]
        start = time.perf_counter()
        process = subprocess.Popen([*run, "--out", str(folder / f"out{size}"), "--device", "cpu"])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"embedrl embed ended with {status}")
        lines.append(f"| {size} | {usage.ru_maxrss / 1024:.0f} | {time.perf_counter() - start:.0f} |")
    return lines


def search(folder: Path, count: int, dim: int, queries: int) -> list[str]:
    """Table 3."""
    rng = np.random.default_rng(0)
    lines = ["| vectors | search | ms a query | recall of the best 10 | seconds to build |", "|---|---|---:|---:|---:|"]
    centres = rng.standard_normal((max(count // 100, 1), dim), dtype=np.float32)
    for name in ("about centres", "even"):
        drawn = rng.standard_normal((count + queries, dim), dtype=np.float32)
        if name == "about centres":
            drawn = 0.7 * drawn + centres[rng.integers(0, len(centres), len(drawn))]
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        np.save(folder / "vectors.npy", drawn[:count])
        vectors, asked = np.load(folder / "vectors.npy", mmap_mode="c"), torch.from_numpy(drawn[count:])
        start = time.perf_counter()
        _graph(folder / f"{name}.faiss", vectors)
        built = time.perf_counter() - start
        graph = _graph(folder / f"{name}.faiss", vectors)
        known = torch.from_numpy(vectors)
        want, exact_ms = _timed(lambda query, known=known: exact(known, query, TOP)[1], asked)
        got, graph_ms = _timed(lambda query, graph=graph: torch.from_numpy(graph.search(query.numpy(), TOP)[1]), asked)
        shared = sum(len(set(a) & set(b)) for a, b in zip(want.tolist(), got.tolist(), strict=True))
        lines.append(f"| {name} | exact | {exact_ms:.2f} | 1 | 0 |")
        lines.append(f"| {name} | hnsw | {graph_ms:.2f} | {shared / want.numel():.3f} | {built:.0f} |")
    return [*lines, "", f"{count:,} vectors of {dim} numbers, {queries} queries."]


def _timed(find: Callable[[torch.Tensor], torch.Tensor], queries: torch.Tensor) -> tuple[torch.Tensor, float]:
    find(queries[:1])  # pages of the file are in memory, as after the first query
    start = time.perf_counter()
    found = torch.cat([find(one[None]) for one in queries])
    return found, 1e3 * (time.perf_counter() - start) / len(queries)


def main(argv: list[str] | None = None) -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_model(folder / "model" / "embedder" / "huggingface")
        embedder = folder / "embedder"
        export_checkpoint(str(folder / "model" / "embedder"), str(embedder))
        lines = ["# The pair as a tool", "", f"`python benchmarks/bench_pair.py`, {arguments.threads} thread(s)", ""]
        lines += ["## Embedding", "", *speed(folder, embedder, arguments.items, arguments.rounds)]
        lines += ["", "## Memory of embedrl embed", "", *memory(folder, embedder, arguments.items)]
        lines += ["", "## Search", "", *search(folder, arguments.vectors, arguments.dim, arguments.queries)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
