# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a conversion, the same command goes on and the folder is that of an unbroken run, byte for byte."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedrl_verl.convert.inputs import LocalRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.data.files import finishing_command
from embedrl_verl.errors import ResourceError
from tests.convert.conftest import Draw, files_below, question, write_lines
from tests.convert.slow_script import SlowConverter

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def source(tmp_path: Path, draw: Draw) -> Path:
    """60 rows with images, three bad rows, and two ids that come twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.png").write_bytes(draw(index))
    rows: list[Any] = [question(index, id=f"id {index % 58}", image=f"{index % 6}.png") for index in range(60)]
    write_lines(folder / "f.jsonl", [*rows[:20], b"{broken", *rows[20:], question(60, id="x", image="gone.png"), b"[]"])
    return folder


def convert(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"place": "files", "shard_rows": 20, "max_bad_share": 0.5, **options}
    return run_conversion(LocalRoot(source), SlowConverter(0.0), JobOptions(out=str(out), **options))


def in_child(action: Callable[[], Any]) -> int:
    """Exit code of a forked process that runs the action; negative: the signal that killed it."""
    process = FORK.Process(target=action)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def killed_at_rename(number: int, after: bool, source: Path, out: Path) -> None:
    """Convert, and die by SIGKILL right before or after a rename: every change that others can see is one."""
    replace, done = os.replace, [0]

    def counting(*names: Any) -> None:
        done[0] += 1
        if done[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if done[0] == number and after:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting
    convert(source, out, shard_rows=40)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_rename_changes_nothing_in_the_end(
    source: Path, tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda number: None)  # slow, and of no use against a kill
    convert(source, tmp_path / "unbroken", shard_rows=40)
    expected = files_below(tmp_path / "unbroken")
    kills = 0
    for number in range(1, 200):
        out = tmp_path / f"out{number}"
        code = in_child(lambda: killed_at_rename(number, after, source, out))  # noqa: B023 (called at once)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        convert(source, out, shard_rows=40)
        assert files_below(out) == expected, f"killed at rename {number}"
    assert kills > 25


def start(source: Path, out: Path, seconds: float) -> subprocess.Popen[bytes]:
    script = ROOT / "tests" / "convert" / "slow_script.py"
    options = ["--input", source, "--out", out, "--seconds", seconds, "--workers", 2, "--shard-rows", 10]
    options += ["--media", "files", "--max-bad-share", 0.5]
    with open(out.parent / "output", "w") as output:  # a pipe would wait for workers that outlive their parent
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, options)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=output,
            stdout=output,
        )


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


def finished_parts(out: Path) -> int:
    return len(list((out / "_work").glob("part-*.json")))


def test_kill_9_twice_leaves_no_worker_and_the_noted_command_finishes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for parts in (1, 3):
        process = start(source, out, 0.1)
        wait_for(lambda: finished_parts(out) >= parts)  # noqa: B023 (called at once)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.kill()
        process.wait()
        assert (out / "_work").is_dir(), "it was too fast to be killed"
        _, left = psutil.wait_procs(workers, timeout=60)
        assert not left
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "_work").glob("part-*.json")}
    assert len(kept) >= 3
    command = shlex.split(finishing_command(out))
    finished = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 3, finished.stderr
    assert finished.stderr.count("\npart ") + finished.stderr.startswith("part ") <= 7 - len(kept) + 2  # + ids twice
    convert(source, tmp_path / "unbroken", shard_rows=10)
    unbroken, resumed = files_below(tmp_path / "unbroken"), files_below(out)
    assert list(unbroken) == list(resumed)
    differing = [name for name in unbroken if unbroken[name] != resumed[name]]
    assert set(differing) <= {"data_card.json"}  # settings hold the seconds only


def test_a_killed_worker_ends_the_run_with_a_way_on(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", 0.1)
    wait_for(lambda: finished_parts(tmp_path / "out") >= 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    worker = next(child for child in workers if "spawn_main" in " ".join(child.cmdline()))
    worker.kill()
    assert process.wait(timeout=300) == 4
    errors = (tmp_path / "output").read_text()
    assert "a worker process was killed" in errors
    assert "run the same command again to go on" in errors
    convert(source, tmp_path / "unbroken", shard_rows=10)
    convert(source, tmp_path / "out", shard_rows=10)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "unbroken")


def write_with_little_room(source: Path, out: Path, report: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # stands for a full disk: a write fails half-way
    try:
        convert(source, out)
    except ResourceError as error:
        os.write(os.open(report, os.O_CREAT | os.O_WRONLY), str(error).encode()[:4000])


def test_a_write_that_fails_names_the_row_and_the_command_goes_on(source: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report"
    assert in_child(lambda: write_with_little_room(source, out, report)) == 0
    message = report.read_text()
    assert message.startswith("cannot write while converting f.jsonl, row 0 (")
    assert "make room, and run the same command again" in message
    assert not [path for path in files_below(out) if path.endswith(".tmp")]
    convert(source, out)
    convert(source, tmp_path / "unbroken")
    assert files_below(out) == files_below(tmp_path / "unbroken")
