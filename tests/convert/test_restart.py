# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed goes on; `--restart` removes what a conversion wrote, and nothing else."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedrl_verl.data.files import finishing_command
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.conftest import MAP, Convert, Draw, files_below, question, records, rejected, write_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path, draw: Draw) -> Path:
    """A jsonl file, with an image of its own folder in each row."""
    for index in range(12):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{index}.png").write_bytes(draw(index))
    return write_lines(tmp_path / "in" / "f.jsonl", [question(index, image=f"{index}.png") for index in range(12)])


def run_script(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "w") as output:  # a pipe would wait for workers that outlive their parent
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def test_after_kill_9_at_any_moment_the_noted_command_finds_every_row_once(tmp_path: Path, source: Path) -> None:
    rows: list[Any] = [question(i, id=f"id {i % 590}", image=f"{i % 12}.png") for i in range(600)]  # 10 ids come twice
    write_lines(source, [*rows[:200], b"{broken", *rows[200:], question(600, id="x", image="gone.png"), b"[]"])
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(ROOT / "data_preprocess/generic.py"), "--input", str(source), "--out", str(out)]
    command += ["--column", *MAP, "pair_id=id", "--source", "own", "--shard-rows", "10", "--workers", "2"]
    command += ["--media", "files", "--max-bad-share", "0.5"]
    killed = 0
    for parts in (0, 1, 20, 45, 61, 62):
        process = run_script(command, log)
        while process.poll() is None and (parts == 0 or len(list(out.glob("part-*.parquet"))) < min(parts, 61)):
            time.sleep(0.01)
        if parts == 62:  # among the parts that are made again for their ids
            time.sleep(0.3)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        killed += process.wait() == -9
        assert not psutil.wait_procs(workers, timeout=60)[1]
        command = shlex.split(finishing_command(out)) or command
    assert killed >= 4
    assert run_script(command, log).wait(timeout=300) == 3, log.read_text()
    assert [record.pair_id for record in records(out)] == [f"id {index}" for index in range(590)]
    assert sorted((line["line"], line["field"]) for line in rejected(out)) == [
        (201, ""),
        *((592 + index, "pair_id") for index in range(10)),
        (602, "query.images[0]"),
        (603, ""),
    ]
    assert len(list((out / "media").rglob("*.png"))) == 12
    assert not [name for name in files_below(out) if name.endswith(".tmp") or "_work" in name]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "name", ["part-foreign.parquet", "part-00000.parquet", "_work/state.json", "rejected.jsonl", "data_card.md"]
)
def test_a_folder_that_no_conversion_made_is_refused_and_left_as_it_is(
    tmp_path: Path, source: Path, convert: Convert, name: str, restart: bool
) -> None:
    for own in (name, "media/photo.jpg", "media/ab/.photo.tmp"):
        (tmp_path / "out" / own).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / own).write_text("mine")
    before = files_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{name.split('/')[-1]}.*name another folder"):
        convert(source, restart=restart)
    assert files_below(tmp_path / "out") == before


def test_own_media_beside_the_output_outlive_a_restart(tmp_path: Path, draw: Draw, convert: Convert) -> None:
    own = tmp_path / "own"
    (own / "media" / "ab").mkdir(parents=True)
    (own / "media" / "0.png").write_bytes(draw(0))
    (own / "media" / "ab" / ".half.tmp").write_bytes(b"mine")
    source = write_lines(own / "photos.jsonl", [question(0, image="media/0.png")])
    before = files_below(own)
    # the folder is input and output
    root = {"media_root": str(own)}
    convert(source, "own", **root)
    with pytest.raises(ConfigError, match="name another folder"):
        convert(source, "own", shard_rows=5, **root)
    with pytest.raises(ConfigError, match=r"0\.png was not written by a conversion, and --media files would mix"):
        convert(source, "own", shard_rows=5, restart=True, media="files", **root)
    assert convert(source, "own", shard_rows=5, restart=True, **root)["build"]["settings"]["shard_rows"] == 5
    assert before.items() <= files_below(own).items()


@pytest.mark.parametrize("is_finished", [True, False])
def test_all_that_a_conversion_wrote_but_its_media_is_removed(
    tmp_path: Path, source: Path, convert: Convert, is_finished: bool
) -> None:
    if is_finished:
        convert(source, media="files", shard_rows=3)
    else:
        write_lines(source, [question(0, image="0.png"), *[question(index, answer=None) for index in range(1, 12)]])
        with pytest.raises(DataError, match="cannot be used"):
            convert(source, max_bad_share=0.5, media="files", shard_rows=1)
        write_lines(source, [question(index, image=f"{index}.png") for index in range(12)])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(source, media="embed", restart=True)
    convert(source, "new", media="embed")
    found = {name: content for name, content in files_below(tmp_path / "out").items() if not name.startswith("media/")}
    assert found == {**files_below(tmp_path / "new"), "notes.txt": b"mine"}


def test_a_part_of_the_user_among_ours_and_input_that_would_go_are_named_and_nothing_goes(
    tmp_path: Path, source: Path, convert: Convert
) -> None:
    convert(source, media="files")
    part, foreign = tmp_path / "out" / "part-00000.parquet", tmp_path / "out" / "part-foreign.parquet"
    before = files_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"--restart would remove {part}, which this conversion reads"):
        convert(part, restart=True)
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match=f"{foreign} was written by no conversion; move it away"):
        convert(source, media="embed", restart=True)
    assert files_below(tmp_path / "out") == {**before, "part-foreign.parquet": b"mine"}
