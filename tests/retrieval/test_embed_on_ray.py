# SPDX-License-Identifier: Apache-2.0
"""`embedrl embed` on two Ray nodes, which this machine plays: the files of one process, also when a node dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.retrieval.conftest import words, write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def files_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def workers(raylet: int) -> list[psutil.Process]:
    """Those of a node that have a part in their hands."""
    found = psutil.process_iter(["ppid", "cmdline"])
    return [one for one in found if one.info["ppid"] == raylet and "ray::_Worker.run" in (one.info["cmdline"] or [])]


@contextmanager
def held_worker(raylet: int, process: subprocess.Popen) -> Iterator[None]:
    """Within it the node's worker stands still with its part, however fast the other one is."""
    found: list[psutil.Process] = []
    while process.poll() is None and not found:
        time.sleep(0.001)
        found = workers(raylet)
    assert found, "the node had no part to do"
    found[0].suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):  # Linux may have ended it with its node
            found[0].kill()


def test_two_nodes_write_the_files_of_one_process_and_one_node_does_after_the_other_has_died(
    pair, embed, two_nodes, tmp_path, monkeypatch
):
    write_corpus(tmp_path / "in", 40)
    with open(tmp_path / "in" / "corpus.jsonl", "a") as lines:
        lines.write('{"id": "bad", "image": "gone.png"}\n')
    monkeypatch.chdir(tmp_path)
    options = ["--rows-per-part", "2", "--max-failed-share", "0.1"]
    assert embed(Path("in/corpus.jsonl"), tmp_path / "local", *options) == 0
    local = files_of(tmp_path / "local")
    assert len(local) == 21 + 3

    out = tmp_path / "shared"
    run = [sys.executable, "-m", "embedrl_verl.cli", "embed", "in/corpus.jsonl", "--out", "shared", *options]
    run += [*words(pair), "--ray", two_nodes.address, "--workers", "2"]
    log = tmp_path / "log.txt"
    with log.open("w") as stderr, subprocess.Popen(run, stderr=stderr) as process:
        while process.poll() is None and len([*out.glob("_work/part-*.json")]) < 2:
            time.sleep(0.05)
        process.kill()  # and with the same command it goes on
    node = two_nodes.worker_nodes.copy().pop()
    raylet = node.all_processes["raylet"][0].process.pid
    while workers(raylet):
        time.sleep(0.05)
    kept = {file.stem: (out / file.stem).stat().st_mtime_ns for file in out.glob("_work/part-*.json")}
    assert 2 <= len(kept) < 21
    with log.open("w") as stderr, subprocess.Popen(run, stderr=stderr) as process, held_worker(raylet, process):
        two_nodes.remove_node(node, allow_graceful=False)
        process.wait()
    assert process.returncode == 0 and "a worker is gone" in log.read_text(), log.read_text()
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert files_of(out) == local
