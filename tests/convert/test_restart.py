# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed goes on; `--restart` removes what a conversion wrote, and nothing else."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedrl_verl.data.files import begin_work, finishing_command, only_writer
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.conftest import (
    MAP,
    ROOT,
    Convert,
    draw,
    files_below,
    question,
    questions,
    records,
    rejected,
    write_lines,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A jsonl file, with an image of its own folder in each row."""
    file = write_lines(tmp_path / "in" / "f.jsonl", [question(index, image=f"{index}.png") for index in range(12)])
    for index in range(12):
        (tmp_path / "in" / f"{index}.png").write_bytes(draw(index))
    return file


def test_after_kill_9_at_any_moment_the_noted_command_finds_every_row_once(tmp_path: Path, source: Path) -> None:
    rows: list[Any] = [question(i, id=f"id {i % 590}", image=f"{i % 12}.png") for i in range(600)]  # 10 ids come twice
    write_lines(source, [*rows[:200], b"{broken", *rows[200:], question(600, id="x", image="gone.png"), b"[]"])
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(ROOT / "data_preprocess/generic.py"), "--input", str(source), "--out", str(out)]
    command += ["--column", *MAP, "pair_id=id", "--source", "own", "--shard-rows", "10", "--workers", "2"]
    command += ["--media", "files", "--max-bad-share", "0.5"]

    def run() -> subprocess.Popen[bytes]:
        with open(log, "w") as output:  # a pipe would wait for workers that outlive their parent
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    killed = 0
    for parts in (0, 1, 20, 45, 61, 62):
        process = run()
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
    assert run().wait(timeout=300) == 3, log.read_text()
    assert [record.pair_id for record in records(out)] == [f"id {index}" for index in range(590)]
    again = [(592 + index, "pair_id") for index in range(10)]
    bad = [(201, ""), *again, (602, "query.images[0]"), (603, "")]
    assert sorted((line["line"], line["field"]) for line in rejected(out)) == bad
    assert len(list((out / "media").rglob("*.png"))) == 12
    assert not [name for name in files_below(out) if name.endswith(".tmp") or "_work" in name]


@pytest.mark.parametrize("name", ["part-foreign.parquet", "_work/state.json", "rejected.jsonl", "data_card.md"])
def test_a_folder_that_no_conversion_made_is_refused_and_left_as_it_is(
    tmp_path: Path, source: Path, convert: Convert, name: str
) -> None:
    for own in (name, "media/photo.jpg", "media/ab/.photo.tmp"):
        (tmp_path / "out" / own).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / own).write_text("mine")
    before = files_below(tmp_path / "out")
    for restart in (False, True):
        with pytest.raises(ConfigError, match=f"{name.split('/')[-1]}.*name another folder"):
            convert(source, restart=restart)
    assert files_below(tmp_path / "out") == before


def test_own_media_beside_the_output_outlive_a_restart(tmp_path: Path, convert: Convert) -> None:
    own = tmp_path / "own"  # input and output
    source = write_lines(own / "photos.jsonl", [question(0, image="media/0.png")])
    (own / "media" / "ab").mkdir(parents=True)
    (own / "media" / "0.png").write_bytes(draw(0))
    (own / "media" / "ab" / ".half.tmp").write_bytes(b"mine")
    before = files_below(own)
    convert(source, "own")
    with pytest.raises(ConfigError, match=r"0\.png was not written by a conversion, and --media files would mix"):
        convert(source, "own", restart=True, media="files")
    assert convert(source, "own", shard_rows=5, restart=True)["build"]["settings"]["shard_rows"] == 5
    assert before.items() <= files_below(own).items()


@pytest.mark.parametrize("is_finished", [True, False])
def test_all_that_a_conversion_wrote_but_its_media_is_removed(
    tmp_path: Path, source: Path, convert: Convert, is_finished: bool
) -> None:
    good = source.read_bytes()
    rows = [question(0, image="0.png"), *questions(range(1, 12), answer=None if not is_finished else "yes")]
    write_lines(source, rows)
    with nullcontext() if is_finished else pytest.raises(DataError, match="cannot be used"):
        convert(source, max_bad_share=0.5, media="files", shard_rows=1)
    source.write_bytes(good)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(source, media="embed", restart=True)
    convert(source, "new", media="embed")
    found = {name: content for name, content in files_below(tmp_path / "out").items() if not name.startswith("media/")}
    assert found == {**files_below(tmp_path / "new"), "notes.txt": b"mine"}


def test_what_is_of_the_user_or_needed_or_being_written_is_named_and_nothing_goes(
    tmp_path: Path, source: Path, convert: Convert
) -> None:
    convert(source, media="files")
    part, foreign = tmp_path / "out" / "part-00000.parquet", tmp_path / "out" / "part-00099.parquet"
    before = files_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"--restart would remove {part}, which this conversion reads"):
        convert(part, restart=True)
    begin_work(tmp_path / "out", ["theirs"])
    with only_writer(tmp_path / "out"), pytest.raises(ConfigError, match="another process is writing"):
        convert(source, media="embed", restart=True)
    assert finishing_command(tmp_path / "out") == "theirs"
    shutil.rmtree(tmp_path / "out" / "_work")
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match=f"{foreign} was written by no conversion; move it away"):
        convert(source, media="embed", restart=True)
    assert files_below(tmp_path / "out") == {**before, "part-00099.parquet": b"mine"}
