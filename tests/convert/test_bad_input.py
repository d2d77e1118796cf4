# SPDX-License-Identifier: Apache-2.0
"""Bad input, as a user meets it: exit code, file and row by name, counted on the data card, good rows kept."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preprocess.generic import Generic
from embedrl_verl.convert.command import convert_main
from embedrl_verl.data.files import pair_files
from embedrl_verl.errors import DataError
from tests.convert.conftest import draw, records, rejected, write_lines
from tests.convert.make_fixtures import Pen, write_video
from tests.data.clips import write_clip
from tests.data.test_media import tiff_with_an_odd_tag

ROOT = Path(__file__).parents[2]
COLUMNS = ("pair_id=id", "query.text=q", "query.images=i", "query.video=v", "target.text=a")
OPTIONS = ["--workers", "1", *(f"--column={column}" for column in COLUMNS)]
GOOD = 12


def good(number: int, **change: Any) -> dict[str, Any]:
    return {"id": number, "q": f"question {number}", "i": "good.png", "v": None, "a": f"answer {number}", **change}


def convert(source: Path, out: Path, *options: str, share: float = 0.2) -> int:
    places = ["--input", str(source), "--out", str(out), "--max-bad-share", str(share)]
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
    film, clip = (folder / "good.mp4").read_bytes(), write_clip(folder / "strange.mp4").read_bytes()
    files = {
        "good.png": draw(1),
        "torn.png": draw(2)[:-200],
        "text.png": b"no image",
        "odd.tif": tiff_with_an_odd_tag(),
        "huge.png": huge_png(draw(1)),
        "../outside.png": draw(4),
        "torn.mp4": film[: len(film) // 2],
        "badly_named.mp4": film.replace(b"Lavf", b"\xff\xfevf", 1),
        "empty.mp4": b"",
        "noise.mp4": b"no video",
        "strange.mp4": clip.replace(b"avc1", b"zz99"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    with wave.open(str(folder / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    return folder


IMAGES = [
    ("gone.png", "no such file in the media root"),
    ("torn.png", "not a readable image"),
    ("text.png", "not a readable image"),
    ("odd.tif", "not a readable image (TypeError"),
    ("huge.png", "over the limit of 89478485 pixels"),
    ("../outside.png", "leaves the media root"),
    ("link.png", "leaves the media root"),
    ("/etc/hostname", "is absolute"),
]
VIDEOS = [
    ("empty.mp4", "the video file is empty"),
    ("sound.mp4", "no video stream"),
    ("torn.mp4", "media path 'torn.mp4'"),
    ("badly_named.mp4", "not a readable video (UnicodeDecodeError"),
    ("clip", "no such file"),
    ("noise.mp4", "not a readable video"),
    ("strange.mp4", "its codec is unknown to this build of FFmpeg"),
]
VALUES = [
    ({"i": ["good.png", "torn.png"]}, "query.images[1]", "not a readable image"),
    ({"i": None, "v": []}, "v", "has no frames"),
    ({"i": None, "v": ["good.png", "gone.png"]}, "query.video.frames[1]", "no such file in the media root"),
    ({"q": 7}, "q", "must be a string; got 7 (int)"),
    ({"a": ["x"]}, "a", "must be a string; got ['x'] (list)"),
    ({"i": {"x": 1}}, "i", "must be a path, the bytes of an image, or a struct of bytes and path"),
    ({"v": 3.5}, "v", "must be a string; got 3.5 (float)"),
    ({"i": 0}, "i", "must be a path, the bytes of an image, or a struct of bytes and path; got 0 (int)"),
    ({"i": None, "v": {"path": "good.mp4", "fps": 10**400}}, "v.fps", "must be a number; got 1000"),
    ({"i": None, "v": {"path": "good.mp4", "bytes": "x"}}, "v", "holds the bytes of a video file"),
    ({"a": None}, "", "target must have text, images or a video"),
    ({"id": True}, "id", "must be a string; got True (bool)"),
    ({"id": 3}, "pair_id", "must be unique; rows.jsonl, line 4 has it too"),
    *(({"i": path}, "query.images[0]", reason) for path, reason in IMAGES),
    *(({"i": None, "v": path}, "query.video.path", reason) for path, reason in VIDEOS),
]


@pytest.mark.parametrize(("change", "field", "reason"), VALUES)
def test_a_bad_row_is_named_counted_and_left_out(
    root: Path, tmp_path: Path, change: dict[str, Any], field: str, reason: str
) -> None:
    write_lines(root / "rows.jsonl", [*map(good, range(GOOD)), good(99, **change), good(100)])
    assert convert(root, tmp_path / "out") == 3
    (entry,) = rejected(tmp_path / "out")
    assert (entry["file"], entry["line"], entry["field"]) == ("rows.jsonl", GOOD + 1, field)
    assert reason in entry["reason"]
    assert ids(tmp_path / "out") == [*map(str, range(GOOD)), "100"]
    found = json.loads((tmp_path / "out/data_card.json").read_text())
    assert (found["records"], found["rejected"]["rows"]) == (GOOD + 1, 1)
    assert f"rows.jsonl, line {GOOD + 1}" in found["rejected"]["causes"][0]["example"]


def torn_parquet(root: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([good(number) for number in range(3)]), root / "b.parquet")
    return cut(root / "b.parquet", 40)


def torn_gz(root: Path) -> Path:
    lines = "".join(json.dumps(good(number, q=os.urandom(40).hex())) + "\n" for number in range(100))
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return cut(root / "rows.jsonl.gz", 1500)


def torn_arrow(root: Path) -> Path:
    tables = [pa.Table.from_pylist([good(10 * i + j, v="", q="long " * 50) for j in range(10)]) for i in range(10)]
    with pa.OSFile(str(root / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return cut(root / "data-0.arrow", 5000)


def cut(file: Path, missing: int) -> Path:
    file.write_bytes(file.read_bytes()[:-missing])
    return file


@pytest.mark.parametrize("tear", [torn_parquet, torn_gz, torn_arrow])
def test_a_file_that_ends_early_stops_the_job_by_name(
    root: Path, tmp_path: Path, tear: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(root / "rows.jsonl", [good(0)])
    file = tear(root)
    assert convert(root, tmp_path / "out", share=1) == 3
    assert f"DataError: {file.name}: cannot be read (" in capsys.readouterr().err
    with pytest.raises(DataError, match="is unfinished"):
        pair_files([tmp_path / "out"])
    file.unlink()
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


def test_bad_bytes_have_one_reason_wherever_they_lie_in_memory(root: Path, tmp_path: Path) -> None:
    rows = [good(0, i=None), good(1, i={"bytes": b"one"}), good(2, i={"bytes": b"two"})]
    media = ("i", pa.struct([("bytes", pa.binary())]))
    schema = pa.schema([("id", pa.int64()), *[(name, pa.string()) for name in "qva"], media])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "rows.parquet")
    assert convert(root, tmp_path / "out", share=1) == 3
    assert len(rejected(tmp_path / "out")) == 2
    assert len({entry["reason"] for entry in rejected(tmp_path / "out")}) == 1
