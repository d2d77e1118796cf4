# SPDX-License-Identifier: Apache-2.0
"""The data build at scale: synthetic records through convert, content-ids and split, with time and memory.

    python benchmarks/bench_data.py [--records 10000 100000 1000000] [--workers 2] [--folder DIR]

prints a markdown table. The input is one jsonl file: half of the pairs have a text as target, half a text and an image
of a pool of 2,000 files. Each stage is the command that a user runs, in processes of its own:

- convert: `data_preprocess/generic.py`, with headers of images checked, input and output hashed;
- content-ids: `embedrl data content-ids`, fills `target_id` from text and image bytes;
- split: `embedrl data split`, by a file of verdicts (80% match), 1,000 of the mismatches to RL.

Peak is the largest sum of the resident memory of all processes of a stage (pages that they share count more than once),
sampled every 50 ms. "Time / records" is relative to the smallest size: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
POOL = 2000
INTERVAL = 0.05
WORDS = (
    "river",
    "stone",
    "bright",
    "seven",
    "paper",
    "window",
    "quiet",
    "orange",
    "train",
    "forest",
    "letter",
    "music",
)


@dataclass(frozen=True)
class Measured:
    """One stage at one size."""

    seconds: float
    peak_bytes: int


def write_input(folder: Path, records: int) -> None:
    """`pairs.jsonl`, `verdicts.parquet` and the pool of images."""
    pool = folder / "images"
    pool.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(POOL):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(buffer, "PNG")
        (pool / f"{index}.png").write_bytes(buffer.getvalue())
    with open(folder / "pairs.jsonl", "w") as file:
        for index in range(records):
            words = " ".join(WORDS[number] for number in rng.integers(0, len(WORDS), 25))
            row = {
                "id": f"pair-{index}",
                "question": f"{words}?",
                "answer": f"{words[:60]} {index}",
                "photo": None,
            }
            if index % 2:
                row |= {"photo": f"images/{rng.integers(0, POOL)}.png"}
            file.write(json.dumps(row) + "\n")
    verdicts = ["mismatch" if index % 5 == 0 else "match" for index in range(records)]
    ids = [f"pair-{index}" for index in range(records)]
    pq.write_table(pa.table({"pair_id": ids, "verdict": verdicts}), folder / "verdicts.parquet")


def stages(folder: Path, workers: int) -> dict[str, list[str]]:
    """Stage -> its command."""
    python, embedrl = sys.executable, [sys.executable, "-m", "embedrl_verl.cli", "data"]
    convert = [python, str(ROOT / "data_preprocess" / "generic.py"), "--input", str(folder / "pairs.jsonl")]
    convert += ["--out", str(folder / "converted"), "--verify", "exists", "--value", "data_source=bench"]
    convert += ["--column", "pair_id=id", "--column", "query.text=question", "--column", "target.text=answer"]
    convert += ["--column", "target.images=photo"]
    ids = [*embedrl, "content-ids", str(folder / "converted"), "--out", str(folder / "with_ids")]
    split = [*embedrl, "split", str(folder / "with_ids"), "--verdicts", str(folder / "verdicts.parquet")]
    split += ["--out", str(folder / "split"), "--rl-from", "mismatch", "--rl-rows", "bench=1000"]
    commands = {"convert": convert, "content-ids": ids, "split": split}
    return {name: [*command, "--workers", str(workers)] for name, command in commands.items()}


def measure(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end, and watch the memory of its processes.

    Raises:
        RuntimeError: the command fails; the message has the end of its output.
    """
    with open(log, "w") as output:
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return Measured(seconds, peak)


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and all below it."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work, 3 GB for a million records (a temporary folder)")
    parser.add_argument("--stages", nargs="+", default=["convert", "content-ids", "split"])
    args = parser.parse_args()
    print("| records | stage | seconds | records/s | peak of all processes | time / records |")
    print("|---:|---|---:|---:|---:|---:|")
    base: dict[str, float] = {}
    for records in args.records:
        folder = Path(tempfile.mkdtemp(prefix="bench_data_", dir=args.folder))
        try:
            write_input(folder, records)
            for name, command in stages(folder, args.workers).items():
                if name not in args.stages:
                    continue
                found = measure(command, folder / f"{name}.log")
                each = found.seconds / records
                relative = each / base.setdefault(name, each)
                print(
                    f"| {records:,} | {name} | {found.seconds:,.1f} | {records / found.seconds:,.0f} | "
                    f"{found.peak_bytes / 2**20:,.0f} MiB | {relative:.2f} |",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
