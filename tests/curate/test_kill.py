# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, the commands lose no row and write none twice."""

import signal
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data.schema import Item

PAIRS, PER_PART = 2400, 200


@pytest.mark.slow
@pytest.mark.parametrize("command", ["content-ids", "split"])
def test_killed_and_started_again_every_row_is_there_once(tmp_path, pair, write_parts, read_all, command):
    records = [pair(f"p{i}", source=f"s{i % 3}", target=Item(text=f"t{i % 50}")) for i in range(PAIRS)]
    files = [str(file) for file in write_parts("in", records, [PER_PART] * (PAIRS // PER_PART - 1))]
    names = [record.pair_id for record in records]
    pq.write_table(
        pa.table({"pair_id": names, "verdict": ["match", "mismatch"] * (PAIRS // 2)}), tmp_path / "v.parquet"
    )
    out, more = tmp_path / "out", ["--verdicts", str(tmp_path / "v.parquet")] if command == "split" else []
    run = [sys.executable, "-m", "embedrl_verl.cli", "data", command, *files, "--out", str(out), "--workers", "2"]
    run += ["--rows-per-part", str(PER_PART), *more]
    kept = {}
    for count in (1, 4, 8):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*out.rglob("part-*.parquet")]) < count:
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]  # workers end with the process that started them
        parts = [report.parents[1] / report.stem for report in out.rglob("_work/part-*.json")]
        kept |= {part: part.stat().st_mtime_ns for part in parts}
    assert subprocess.call(run, stdout=subprocess.DEVNULL) == 0 and kept
    assert all(part.stat().st_mtime_ns == stamp for part, stamp in kept.items())
    sets = [out] if command == "content-ids" else [out / "contrastive", out / "rl"]
    wanted = [names] if command == "content-ids" else [names[::2], names[1::2]]
    assert [[record.pair_id for record in read_all(folder)] for folder in sets] == wanted
    assert not [*out.rglob("_work"), *out.rglob(".*.tmp")]
