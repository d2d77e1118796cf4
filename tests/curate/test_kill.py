# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, the commands end with the same bytes as an unbroken run, and redo no part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate import folders
from embedrl_verl.curate.jobs import run_tasks
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import EmbedderError

MakePair = Callable[..., PairRecord]
WriteParts = Callable[..., list[Path]]
RUN = """
import os, sys, time
from embedrl_verl.cli import main
from embedrl_verl.curate import folders
write, held = folders.write_json, os.environ["HELD"]  # a card that it cannot come to, however late it is killed
folders.write_json = lambda file, *rest: time.sleep(600) if str(file) == held else write(file, *rest)
if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
"""
PAIRS, PER_PART = 2400, 200


def start(script: Path, options: Sequence[str], held: Path | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HELD": str(held or "")}
    command = [sys.executable, str(script), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen[bytes], parts: Path, count: int) -> None:
    """kill -9 once `parts` has so many parts; its workers must go too."""
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.parquet"))) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1].decode())
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("command", ["content-ids", "split"])
def test_killed_twice_and_resumed_gives_the_same_bytes(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, command: str
) -> None:
    records = [pair(f"p{i}", source=f"s{i % 3}", target=Item(text=f"t{i % 50}")) for i in range(PAIRS)]
    (tmp_path / "run.py").write_text(RUN)
    files = [str(file) for file in write_parts("in", records, [PER_PART] * (PAIRS // PER_PART - 1))]
    options = [command, *files, "--rows-per-part", str(PER_PART), "--workers", "2"]
    if command == "split":
        verdicts = pa.table(
            {"pair_id": [f"p{i}" for i in range(PAIRS)], "verdict": ["match", "mismatch"] * (PAIRS // 2)}
        )
        pq.write_table(verdicts, tmp_path / "verdicts.parquet")
        options += ["--verdicts", str(tmp_path / "verdicts.parquet")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(tmp_path / "run.py", [*options, "--out", str(whole)]).wait() == 0
    parts = broken if command == "content-ids" else broken / "rl"
    total = len(list((whole if command == "content-ids" else whole / "rl").glob("part-*.parquet")))
    assert total >= 6
    kept, card = {}, parts / folders.CARD_FILE
    for count in (2, total // 2):
        kill_when(start(tmp_path / "run.py", [*options, "--out", str(broken)], card), parts, count)
        assert not card.exists()
        kept = {path: path.stat().st_mtime_ns for path in sorted(parts.glob("part-*.parquet"))}
        done = {parts / f"part-{entry.stem[1:]}.parquet" for entry in (parts / "_work" / "parts").glob("*.json")}
    assert start(tmp_path / "run.py", [*options, "--out", str(broken)]).wait() == 0
    assert {path for path in kept if path.stat().st_mtime_ns == kept[path]} >= done
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(broken)) for path in broken.rglob("*") if path.is_file())
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_what_is_in_the_journal_is_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []
    failed: list[int] = []

    def task(number: int) -> dict[str, int]:
        if number == 3 and not failed:
            failed.append(number)
            raise EmbedderError("killed")
        done.append(number)
        return {"number": number}

    with pytest.raises(EmbedderError, match="killed"):
        run_tasks(task, range(5), tmp_path / "out" / "_work" / "parts", workers=1, label="t")
    seen: list[int] = []
    run_tasks(
        task,
        range(5),
        tmp_path / "out" / "_work" / "parts",
        workers=1,
        label="t",
        watch=lambda e: seen.append(e["number"]),
    )
    assert done == [0, 1, 2, 3, 4]
    assert seen == [0, 1, 2, 3, 4]
