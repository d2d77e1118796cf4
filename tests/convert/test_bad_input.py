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
from tests.convert.conftest import Draw, records, rejected, write_lines
from tests.convert.make_fixtures import Pen, write_video
from tests.data.clips import write_clip
from tests.data.test_media import tiff_with_an_odd_tag

ROOT = Path(__file__).parents[2]
COLUMNS = {"pair_id": "id", "query.text": "q", "query.images": "i", "query.video": "v", "target.text": "a"}
GOOD = 12


def good(number: int, **change: Any) -> dict[str, Any]:
    return {"id": number, "q": f"question {number}", "i": "good.png", "v": None, "a": f"answer {number}", **change}


def convert(source: Path, out: Path, *options: str, share: float = 0.2) -> int:
    """`data_preprocess/generic.py` in this process."""
    given = [f"--column={key}={column}" for key, column in COLUMNS.items()]
    fixed = ["--input", str(source), "--out", str(out), "--workers", "1", "--max-bad-share", str(share)]
    return convert_main(Generic, "generic", [*fixed, *given, *options])


def ids(out: Path) -> list[str]:
    return [record.pair_id for record in records(out)]


def card(out: Path) -> Any:
    return json.loads((out / "data_card.json").read_text())


def huge_png(small: bytes) -> bytes:
    """A PNG file whose header promises 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.fixture
def root(tmp_path: Path, draw: Draw) -> Path:
    """Media of all sorts."""
    folder = tmp_path / "in"
    (folder / "clip").mkdir(parents=True)
    (folder / "good.png").write_bytes(draw(1))
    (folder / "torn.png").write_bytes(draw(2)[:-200])
    (folder / "text.png").write_bytes(b"no image")
    (folder / "odd.tif").write_bytes(tiff_with_an_odd_tag())
    (folder / "moving.gif").write_bytes(draw(3, "GIF", frames=3))
    (folder / "huge.png").write_bytes(huge_png(draw(1)))
    (tmp_path / "outside.png").write_bytes(draw(4))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    write_video(folder / "good.mp4", [Pen().picture(digit, rows=2) for digit in "1234"])
    film = (folder / "good.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(film[: len(film) // 2])
    (folder / "badly_named.mp4").write_bytes(film.replace(b"Lavf", b"\xff\xfevf", 1))
    with wave.open(str(folder / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(b"no video")
    clip = write_clip(folder / "strange.mp4").read_bytes()
    (folder / "strange.mp4").write_bytes(clip.replace(b"avc1", b"zz99"))
    return folder


MEDIA = [
    ({"i": "gone.png"}, "query.images[0]", "no such file in the media root"),
    ({"i": "torn.png"}, "query.images[0]", "not a readable image"),
    ({"i": "text.png"}, "query.images[0]", "not a readable image"),
    ({"i": "odd.tif"}, "query.images[0]", "not a readable image (TypeError"),
    ({"i": "huge.png"}, "query.images[0]", "over the limit of 89478485 pixels"),
    ({"i": "../outside.png"}, "query.images[0]", "leaves the media root"),
    ({"i": "link.png"}, "query.images[0]", "leaves the media root"),
    ({"i": "/etc/hostname"}, "query.images[0]", "is absolute"),
    ({"i": ["good.png", "torn.png"]}, "query.images[1]", "not a readable image"),
    ({"i": None, "v": []}, "v", "has no frames"),
    ({"i": None, "v": "empty.mp4"}, "query.video.path", "the video file is empty"),
    ({"i": None, "v": "sound.mp4"}, "query.video.path", "no video stream"),
    ({"i": None, "v": "torn.mp4"}, "query.video.path", "media path 'torn.mp4'"),
    ({"i": None, "v": "badly_named.mp4"}, "query.video.path", "not a readable video (UnicodeDecodeError"),
    ({"i": None, "v": "clip"}, "query.video.path", "no such file"),
    ({"i": None, "v": "noise.mp4"}, "query.video.path", "not a readable video"),
    ({"i": None, "v": "strange.mp4"}, "query.video.path", "its codec is unknown to this build of FFmpeg"),
    ({"i": None, "v": ["good.png", "gone.png"]}, "query.video.frames[1]", "no such file in the media root"),
]
VALUES = [
    ({"q": 7}, "q", "must be a string; got 7 (int)"),
    ({"a": ["x"]}, "a", "must be a string; got ['x'] (list)"),
    ({"i": {"x": 1}}, "i", "must be a path, the bytes of an image, or a struct of bytes and path"),
    ({"v": 3.5}, "v", "must be a string; got 3.5 (float)"),
    ({"a": None}, "", "target must have text, images or a video"),
    ({"id": True}, "id", "must be a string; got True (bool)"),
    ({"id": 3}, "pair_id", "must be unique; rows.jsonl, line 4 has it too"),
]


@pytest.mark.parametrize(("change", "field", "reason"), [*MEDIA, *VALUES])
def test_a_bad_row_is_named_counted_and_left_out(
    root: Path, tmp_path: Path, change: dict[str, Any], field: str, reason: str
) -> None:
    rows = [*map(good, range(GOOD)), good(99, **change), good(100)]
    write_lines(root / "rows.jsonl", rows)
    assert convert(root, tmp_path / "out") == 3
    (entry,) = rejected(tmp_path / "out")
    assert (entry["file"], entry["line"], entry["field"]) == ("rows.jsonl", GOOD + 1, field)
    assert reason in entry["reason"]
    assert ids(tmp_path / "out") == [*map(str, range(GOOD)), "100"]
    found = card(tmp_path / "out")
    assert (found["records"], found["rejected"]["rows"]) == (GOOD + 1, 1)
    assert f"rows.jsonl, line {GOOD + 1}" in found["rejected"]["causes"][0]["example"]


def torn_parquet(root: Path) -> Path:
    file = root / "b.parquet"
    pq.write_table(pa.Table.from_pylist([good(number) for number in range(3)]), file)
    file.write_bytes(file.read_bytes()[:-40])
    return file


def torn_gz(root: Path) -> Path:
    lines = "".join(json.dumps(good(number, q=os.urandom(40).hex())) + "\n" for number in range(100))
    file = root / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(lines.encode())[:-1500])
    return file


def torn_arrow(root: Path) -> Path:
    tables = [pa.Table.from_pylist([good(10 * i + j, v="", q="long " * 50) for j in range(10)]) for i in range(10)]
    file = root / "data-0.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    file.write_bytes(file.read_bytes()[:-5000])
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


def test_when_no_row_can_be_used_the_causes_are_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(root / "rows.jsonl", [{"question": "q", "answer": "a"}] * 3)
    options = ["--input", str(root), "--out", str(tmp_path / "out"), "--max-bad-share", "1", "--workers", "1"]
    assert convert_main(Generic, "generic", options) == 3
    said = capsys.readouterr().err
    assert "no pair could be made of 3 rows. Causes:\n  3 x has neither query nor target; say which columns" in said
    assert "The row has question, answer" in said
    assert len(rejected(tmp_path / "out")) == 3


def test_a_media_root_that_is_no_folder_is_refused_before_anything_is_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(root / "rows.jsonl", [good(0)])
    assert convert(root, tmp_path / "out", "--media-root", str(tmp_path / "typo")) == 2
    assert "typo is no folder; --media-root names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_with_its_own_code_and_the_same_command_finishes(root: Path, tmp_path: Path) -> None:
    write_lines(root / "rows.jsonl", [good(number, q="long " * 2000) for number in range(30)])
    columns = " ".join(f"--column={key}={column}" for key, column in COLUMNS.items())
    script = (
        f"{sys.executable} {ROOT / 'data_preprocess/generic.py'} --input {root} {columns} --shard-rows 10 --workers 1"
    )
    outside = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(out: str, limit: str = "") -> subprocess.CompletedProcess[str]:
        command = f"{limit} exec {script} --out {tmp_path / out} --media embed"
        return subprocess.run(["bash", "-c", command], env=outside, capture_output=True, text=True, timeout=300)

    full = run("out", "ulimit -f 8;")  # files of 8 KiB at most: a write fails half-way, as on a full disk
    assert full.returncode == 4, full.stderr
    assert "ResourceError: " in full.stderr and "cannot be written (" in full.stderr
    assert "Traceback" not in full.stderr
    assert run("out").returncode == 0
    assert ids(tmp_path / "out") == [str(number) for number in range(30)]


def test_what_data_commands_write_beside_the_pairs_is_no_input(root: Path, tmp_path: Path) -> None:
    write_lines(root / "rows.jsonl", [good(0), good(1, i="gone.png"), good(2)])
    assert convert(root, tmp_path / "first", share=0.5) == 3
    again = ["--input", str(tmp_path / "first"), "--media-root", str(root), "--out", str(tmp_path / "second")]
    assert convert_main(Generic, "generic", [*again, "--workers", "1"]) == 0
    assert ids(tmp_path / "second") == ["0", "2"]
    split = tmp_path / "later"  # a folder whose card is that of another command
    split.mkdir()
    (split / "data_card.json").write_text(json.dumps({"format": "embedrl pair records 1", "settings": {}, "input": []}))
    assert convert(root, split) == 2


def test_bad_bytes_have_one_reason_wherever_they_lie_in_memory(root: Path, tmp_path: Path) -> None:
    rows = [good(0), good(1, i={"bytes": b"one"}), good(2, i={"bytes": b"two"})]
    schema = pa.schema(
        [("id", pa.int64()), *[(name, pa.string()) for name in "qva"], ("i", pa.struct([("bytes", pa.binary())]))]
    )
    rows[0]["i"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "rows.parquet")
    assert convert(root, tmp_path / "out", share=1) == 3
    assert len({entry["reason"] for entry in rejected(tmp_path / "out")}) == 1
    assert card(tmp_path / "out")["rejected"]["causes"][0]["rows"] == 2
