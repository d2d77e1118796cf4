# SPDX-License-Identifier: Apache-2.0
"""Bad input, as a user meets it: exit code, file and row by name, counted on the data card, good rows kept."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preprocess.generic import Generic
from embedrl_verl.convert.command import convert_main
from embedrl_verl.data.files import pair_files
from embedrl_verl.errors import DataError
from tests.convert.conftest import ROOT, draw, records, rejected, write_lines
from tests.convert.make_fixtures import Pen, write_video

COLUMNS = ("pair_id=id", "query.text=q", "query.images=i", "query.video=v", "target.text=a")
OPTIONS = ["--workers", "1", *(f"--column={column}" for column in COLUMNS)]


def good(number: int, **change: Any) -> dict[str, Any]:
    return {"id": number, "q": f"question {number}", "i": "good.png", "v": None, "a": f"answer {number}", **change}


def convert(source: Path, out: Path, *options: str) -> int:
    places = ["--input", str(source), "--out", str(out), "--max-bad-share", "1"]
    return convert_main(Generic, "generic", [*places, *OPTIONS, *options])


def ids(out: Path) -> list[str]:
    return [record.pair_id for record in records(out)]


def huge_png(small: bytes) -> bytes:
    """A PNG file whose header promises 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Media of all sorts."""
    folder = tmp_path / "in"
    (folder / "clip").mkdir(parents=True)
    write_video(folder / "good.mp4", [Pen().picture(digit, rows=2) for digit in "1234"])
    film = (folder / "good.mp4").read_bytes()
    files = {"good.png": draw(1), "torn.png": draw(2)[:-200], "huge.png": huge_png(draw(1)), "../outside.png": draw(4)}
    files |= {"torn.mp4": film[: len(film) // 2], "empty.mp4": b"", "noise.mp4": b"no video"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


BAD = [
    ({"i": ["good.png", "torn.png"]}, "query.images[1]", "not a readable image"),
    ({"i": "gone.png"}, "query.images[0]", "no such file in the media root"),
    ({"i": "huge.png"}, "query.images[0]", "over the limit of 89478485 pixels"),
    ({"i": "../outside.png"}, "query.images[0]", "leaves the media root"),
    ({"i": {"x": 1}}, "i", "must be a path, the bytes of an image, or a struct of bytes and path"),
    ({"i": 0}, "i", "must be a path, the bytes of an image, or a struct of bytes and path; got 0 (int)"),
    ({"v": "empty.mp4"}, "query.video.path", "the video file is empty"),
    ({"v": "torn.mp4"}, "query.video.path", "media path 'torn.mp4'"),
    ({"v": "noise.mp4"}, "query.video.path", "not a readable video"),
    ({"v": "clip"}, "query.video.path", "no such file"),
    ({"v": []}, "v", "video must have exactly one of"),
    ({"v": ["good.png", "gone.png"]}, "query.video.frames[1]", "no such file in the media root"),
    ({"v": 3.5}, "v", "must be a string; got 3.5 (float)"),
    ({"v": {"path": "good.mp4", "fps": 10**400}}, "v.fps", "must be a number; got 1000"),
    ({"v": {"path": "good.mp4", "bytes": "x"}}, "v", "holds the bytes of a video file"),
    ({"q": 7}, "q", "must be a string; got 7 (int)"),
    ({"a": ["x"]}, "a", "must be a string; got ['x'] (list)"),
    ({"a": None}, "", "target must have text, images or a video"),
    ({"id": True}, "id", "must be a string; got True (bool)"),
    ({"id": 0}, "pair_id", "must be unique; rows.jsonl, line 1 has it too"),
]


def test_a_bad_row_is_named_counted_and_left_out(root: Path, tmp_path: Path) -> None:
    rows = [good(0), *(good(index, **change) for index, (change, _, _) in enumerate(BAD, start=1)), good(100)]
    write_lines(root / "rows.jsonl", rows)
    assert convert(root, tmp_path / "out") == 3
    found = [(entry["file"], entry["line"], entry["field"]) for entry in rejected(tmp_path / "out")]
    assert found == [("rows.jsonl", line, field) for line, (_, field, _) in enumerate(BAD, start=2)]
    for entry, (_, _, reason) in zip(rejected(tmp_path / "out"), BAD, strict=True):
        assert reason in entry["reason"]
    assert ids(tmp_path / "out") == ["0", "100"]
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert (card["records"], card["rejected"]["rows"]) == (2, len(BAD))
    assert card["rejected"]["causes"][0]["example"].startswith("rows.jsonl, line ")


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl.gz", "corrupt.jsonl.gz", "data-0.arrow"])
def test_a_damaged_file_stops_the_job_by_name(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(root / "rows.jsonl", [good(0)])
    table = pa.Table.from_pylist([good(number, v="", q=os.urandom(40).hex()) for number in range(100)])
    if name.endswith(".parquet"):
        pq.write_table(table, root / name)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(root / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    else:
        (root / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()))
    whole = (root / name).read_bytes()
    damaged = whole[:3000] + b"\xff" * 200 + whole[3200:] if name.startswith("corrupt") else whole[:-1500]
    (root / name).write_bytes(damaged)
    assert convert(root, tmp_path / "out") == 3
    assert f"DataError: {name}: cannot be read (" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(DataError, match="is unfinished"):
        pair_files([tmp_path / "out"])
    (root / name).unlink()
    assert convert(root, tmp_path / "out", "--restart") == 0
    assert ids(tmp_path / "out") == ["0"]


def test_a_media_root_that_is_no_folder_is_refused_before_anything_is_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(root / "rows.jsonl", [good(0)])
    assert convert(root, tmp_path / "out", "--media-root", str(tmp_path / "typo")) == 2
    assert "typo is no folder; --media-root names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_with_its_own_code_and_the_same_command_finishes(root: Path, tmp_path: Path) -> None:
    write_lines(root / "rows.jsonl", [good(number, q="long " * 2000) for number in range(30)])
    words = [sys.executable, str(ROOT / "data_preprocess/generic.py"), *OPTIONS, "--shard-rows", "10"]
    words += ["--input", str(root), "--out", str(tmp_path / "out"), "--media", "embed"]

    def run(limit: str = "") -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", f'{limit} exec "$@"', "-", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    full = run("ulimit -f 8;")  # files of 8 KiB at most: a write fails half-way, as on a full disk
    assert full.returncode == 4, full.stderr
    assert "ResourceError: " in full.stderr and "cannot be written (" in full.stderr
    assert "Traceback" not in full.stderr
    assert run().returncode == 0
    assert ids(tmp_path / "out") == [str(number) for number in range(30)]


def test_bad_bytes_are_named_by_row_with_one_reason_wherever_they_lie_in_memory(root: Path, tmp_path: Path) -> None:
    rows = [good(0, i=None), good(1, i={"bytes": b"one"}), good(2, i={"bytes": b"two"})]
    media = ("i", pa.struct([("bytes", pa.binary())]))
    schema = pa.schema([("id", pa.int64()), *[(name, pa.string()) for name in "qva"], media])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "rows.parquet")
    assert convert(root, tmp_path / "out") == 3
    found = rejected(tmp_path / "out")
    assert [(entry["file"], entry["row"]) for entry in found] == [("rows.parquet", 1), ("rows.parquet", 2)]
    assert found[0]["reason"] == found[1]["reason"]
