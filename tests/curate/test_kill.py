# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, the commands lose no row and write none twice."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data.schema import Item
from tests.curate.conftest import pair, read_all, write_parts

PAIRS, PER_PART = 2400, 200


@pytest.mark.slow
@pytest.mark.parametrize("command", ["content-ids", "split"])
def test_killed_and_started_again_every_row_is_there_once(command):
    records = [pair(f"p{i}", source=f"s{i % 3}", target=Item(text=f"t{i % 50}")) for i in range(PAIRS)]
    files, names = write_parts("in", records, [PER_PART] * (PAIRS // PER_PART - 1)), [one.pair_id for one in records]
    pq.write_table(pa.table({"pair_id": names, "verdict": ["match", "mismatch"] * (PAIRS // 2)}), "v.parquet")
    run = [sys.executable, "-m", "embedrl_verl.cli", "data", command, *map(str, files), "--out", "out"]
    run += ["--workers", "2", "--rows-per-part", str(PER_PART), *(["--verdicts", "v.parquet"] * (command == "split"))]
    out, kept = Path("out"), {}
    for count in (1, 4, 8):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*out.rglob("part-*.parquet")]) < count:
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]  # workers end with the process that started them
        parts = [report.parents[1] / report.stem for report in out.rglob("_work/part-*.json")]
        kept |= {part: part.stat().st_mtime_ns for part in parts}
    assert subprocess.call(run, stdout=subprocess.DEVNULL) == 0 and kept
    assert all(part.stat().st_mtime_ns == stamp for part, stamp in kept.items())
    wanted = {".": names} if command == "content-ids" else {"contrastive": names[::2], "rl": names[1::2]}
    assert {name: [record.pair_id for record in read_all(out / name)] for name in wanted} == wanted
    assert not [*out.rglob("_work"), *out.rglob(".*.tmp")]
