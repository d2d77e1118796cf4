# SPDX-License-Identifier: Apache-2.0
"""`embedrl embed` against sentence-transformers' encode of the same exported Embedder, its memory, a kill, and search.

`python benchmarks/bench_pair.py [--embedder DIR] [--items 200] [--corpus 2000] [--out FILE]` prints markdown tables.

1. Items a second, models loaded, from files to vectors on the disk: what the command does for its parts (think=never),
   and sentence-transformers over the same lines and pictures, written as one .npy. The two take turns, and the
   median of the rounds counts; all vectors are compared. Numbers of five digits, every fourth as a picture of 140 x 112
   pixels.
2. The command over a whole corpus: most memory in use during each tenth of the parts.
3. Killed (SIGKILL) with half of the parts made and started again: the files of a run that nobody killed.
4. Search, one query at a time: every vector compared, and the graph (FAISS' HNSW) with the share of the exact best ten
   that it finds. Vectors of the corpus (rows taken out of it are the queries), and as many drawn ones: evenly (the
   hardest case: all are nearly equally far), and about centres.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from embedrl_verl.data.media import LoadedItem
from embedrl_verl.embedder import build_messages
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.export.record import TrainingRecord, read_record, write_record
from embedrl_verl.model.options import PairOptions
from embedrl_verl.retrieval.embed import Maker
from embedrl_verl.retrieval.index import Index, _graph, exact
from embedrl_verl.retrieval.inputs import Inputs, Reading
from recipes.tiny_digits.canvas import Grid, ScanBox, Strip, draw_canvas
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import TRAIN_SCANS

PART, BATCH, TOP, TENTHS = 1024, 32, 10, 10
SIZES = {"profile": "embed_rl", "image_min_tokens": 4, "image_max_tokens": 64}
"""As the recipe of the digits trains."""


def write_corpus(folder: Path, count: int) -> Path:
    """Lines of numbers, in an order that no batch gains from; every fourth is a picture."""
    rng = np.random.default_rng(0)
    scans = ScanBox(TRAIN_SCANS, rng)
    folder.mkdir()
    with open(folder / "corpus.jsonl", "w") as file:
        for i, number in enumerate(rng.permutation(100_000)[np.arange(count) % 100_000].tolist()):
            line = {"id": str(i), "text": f"{number:05d}"}
            if i % 4 == 0:
                canvas = draw_canvas(Grid(4, 5), [Strip(1, 0, tuple(scans.draw(line.pop("text"))))])
                canvas.save(folder / f"{i}.png", compress_level=1)
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
            messages.append(build_messages(LoadedItem(line.get("text", ""), "", images, ()), None, ()))
        found.append(model.encode(messages, batch_size=BATCH, show_progress_bar=False))
    np.save(out, np.concatenate(found))


def speed(folder: Path, embedder: Path, count: int, rounds: int) -> list[str]:
    """Table 1."""
    corpus = write_corpus(folder / "corpus", count)
    maker = Maker(PairOptions(str(embedder), device="cpu"), "never", Reading("target"), BATCH)
    maker(Inputs([str(corpus)], BATCH).parts[0], folder / "first.parquet")  # loads the models
    other = SentenceTransformer(str(embedder), device="cpu")

    def embed() -> None:
        for number, part in enumerate(Inputs([str(corpus)], PART).parts):
            maker(part, folder / f"part-{number}.parquet")

    ways: dict[str, Callable[[], None]] = {
        "embedrl embed": embed,
        "sentence-transformers": lambda: encode_by_sentence_transformers(other, corpus, folder / "other.npy"),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            way()
            spent[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    rows = [row for part in sorted(folder.glob("part-*")) for row in pq.read_table(part)["vector"].to_pylist()]
    cosine = (np.array(rows, np.float32) * np.load(folder / "other.npy")).sum(1).min()
    medians = {name: np.median(taken, axis=0) for name, taken in spent.items()}
    ours = medians["embedrl embed"][0]
    return [
        "| way | items a second | times the time of embedrl embed | CPU ms an item |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {count / seconds:.0f} | {seconds / ours:.2f} | {1e3 * cpu / count:.2f} |"
            for name, (seconds, cpu) in medians.items()
        ),
        "",
        f"{count} items; median of {rounds} rounds; lowest cosine between the two {cosine:.6f}.",
    ]


def command(corpus: Path, embedder: Path, out: Path, rows_per_part: int) -> list[str]:
    """Words of the command."""
    run = [sys.executable, "-m", "embedrl_verl.cli", "embed", str(corpus), "--embedder", str(embedder)]
    return [*run, "--device", "cpu", "--out", str(out), "--rows-per-part", str(rows_per_part)]


def memory(corpus: Path, embedder: Path, out: Path, count: int) -> list[str]:
    """Table 2."""
    per_part = min(PART, max(1, count // (4 * TENTHS)))
    parts = -(-count // per_part)
    most, ends, at_exit, start = [0.0] * TENTHS, [0.0] * TENTHS, 0.0, time.perf_counter()
    with psutil.Popen(command(corpus, embedder, out, per_part)) as process:
        while process.poll() is None:
            tenth = min(len([*out.glob("_work/part-*.json")]) * TENTHS // parts, TENTHS - 1)
            try:
                used = process.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                break
            if (out / "data_card.json").exists():
                at_exit = max(at_exit, used)
            else:
                most[tenth], ends[tenth] = max(most[tenth], used), time.perf_counter() - start
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"embedrl embed ended with {process.returncode}")
    lines = ["| tenth of the parts | most MiB in use | seconds since the start |", "|---:|---:|---:|"]
    lines += [f"| {i + 1} | {one:.0f} | {end:.0f} |" for i, (one, end) in enumerate(zip(most, ends, strict=True))]
    speed = 0.9 * count / (ends[-1] - ends[0])
    return [
        *lines,
        "",
        f"{count:,} items, {parts} parts of {per_part}; memory of the last tenth against the second: "
        f"{most[-1] / most[1] - 1:+.1%} ({at_exit:.0f} MiB as Python ends); {speed:.0f} items a second "
        "after the first.",
    ]


def killed(folder: Path, embedder: Path, count: int) -> list[str]:
    """Part 3."""
    corpus, per_part = write_corpus(folder / "to_kill", count), max(1, count // 20)
    whole, broken = (command(corpus, embedder, folder / name, per_part) for name in ("whole", "broken"))
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    with subprocess.Popen(broken, stdout=subprocess.DEVNULL) as process:
        while (made := len([*(folder / "broken").glob("_work/part-*.json")])) < 10 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"it was to be killed at its work; it ended with {process.returncode}")
    subprocess.run(broken, check=True, stdout=subprocess.DEVNULL)
    one, other = (digests(folder / name) for name in ("whole", "broken"))
    if one != other:
        raise RuntimeError(f"not the same: {sorted(set(one.items()) ^ set(other.items()))}")
    return [
        f"{count} items: killed with {made} of 20 parts, resumed: {len(one)} files, each of the SHA-256 of a whole run."
    ]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {str(one.relative_to(folder)): hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.rglob("*.*")}


def search(folder: Path, embedded: npt.NDArray[np.float32], queries: int) -> list[str]:
    """Table 4."""
    rng = np.random.default_rng(0)
    some = np.zeros(len(embedded), bool)
    some[rng.choice(len(embedded), queries, replace=False)] = True
    count, dim = len(embedded) - queries, embedded.shape[1]
    even = rng.standard_normal((len(embedded), dim), dtype=np.float32)
    centres = rng.standard_normal((max(count // 100, 1), dim), dtype=np.float32)
    grouped = 0.7 * even + centres[rng.integers(0, len(centres), len(even))]
    lines = ["| vectors | search | ms a query | recall of the best 10 | seconds to build |", "|---|---|---:|---:|---:|"]
    for name, drawn in {"embedded": embedded, "about centres": grouped, "even": even}.items():
        drawn = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        np.save(folder / "vectors.npy", drawn[~some])
        vectors, asked = np.load(folder / "vectors.npy", mmap_mode="c"), torch.from_numpy(drawn[some])
        start = time.perf_counter()
        graph = _graph(folder / f"{name}.faiss", vectors)
        built = time.perf_counter() - start
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
    parser.add_argument("--embedder", type=Path, help="of the digits recipe; none: an untrained one")
    parser.add_argument("--items", type=int, default=200, help="of table 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", type=int, default=2000, help="items of tables 2 and 4")
    parser.add_argument("--killed", type=int, default=400, help="items of part 3")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, embedder = folder / "model" / "embedder", folder / "embedder"
        if arguments.embedder:
            shutil.copytree(arguments.embedder, model / "huggingface")
        else:
            build_tiny_model(model / "huggingface")
        write_record(model, read_record(model / "huggingface") or TrainingRecord(settings=SIZES))
        export_checkpoint(str(model), str(embedder))
        lines = ["# The pair as a tool", "", f"`python benchmarks/bench_pair.py`, {arguments.threads} thread(s)", ""]
        lines += ["## Embedding", "", *speed(folder, embedder, arguments.items, arguments.rounds)]
        print("\n".join(lines), flush=True)
        corpus, out = write_corpus(folder / "whole_corpus", arguments.corpus), folder / "vectors"
        lines += ["", "## Memory of embedrl embed", "", *memory(corpus, embedder, out, arguments.corpus)]
        lines += ["", "## Killed and resumed", "", *killed(folder, embedder, arguments.killed)]
        print("\n".join(lines), flush=True)
        lines += ["", "## Search", "", *search(folder, Index(out).vectors, arguments.queries)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
