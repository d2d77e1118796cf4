# SPDX-License-Identifier: Apache-2.0
"""Media in the rows are counted before they are read, and refused where they cannot fit; a video is decoded once."""

import logging
import os
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data import inspection, prompts
from embedrl_verl.data.identity import content_id
from embedrl_verl.data.inspection import LocatedPair, PairInspector, check_memory, embedded_bytes, locate_pairs
from embedrl_verl.data.parquet import write_pairs
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms.machine import Memory
from tests.data.clips import write_clip

NOISE = os.urandom(1 << 16)


def record(number, **target):
    return PairRecord(f"p{number}", "s", "find", Item(text="q"), Item(**target), "")


@pytest.fixture
def files(tmp_path):
    write_pairs([record(i, images=(NOISE[i:],)) for i in range(10)], tmp_path / "a.parquet")
    frames = [record(10 + i, video=Video(frames=(NOISE[i:], "b.png"))) for i in range(10)]
    write_pairs(frames, tmp_path / "b.parquet")
    write_pairs([record(20, images=("c.png",)), record(21, text="t")], tmp_path / "c.parquet")
    return [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.parquet")]


def machine(monkeypatch, size):
    monkeypatch.setattr(inspection, "machine_memory", lambda: Memory(available=0, total=size))


def test_media_bytes_are_counted_wherever_they_stand_and_paths_and_other_columns_are_not(files, tmp_path):
    for file in files[:2]:
        assert embedded_bytes(file) == pytest.approx(10 * len(NOISE), rel=0.01)
    table = pq.read_table(files[2])
    other = pa.array([{"path": None, "bytes": NOISE}] * table.num_rows)
    pq.write_table(table.append_column("thumbnail", other), tmp_path / "d.parquet")
    assert embedded_bytes(files[2]) < 1000 and embedded_bytes(str(tmp_path / "d.parquet")) < 1000


def test_what_cannot_fit_is_refused_before_it_is_read(files, monkeypatch):
    machine(monkeypatch, 15 * len(NOISE))
    with monkeypatch.context() as patched:
        patched.setattr(inspection, "scan_located", lambda files: pytest.fail("was read"))
        with pytest.raises(ResourceError, match=r"a\.parquet and the files beside it .*--media files"):
            locate_pairs(files)
    assert len(locate_pairs(files[:1])[0]) == 10


def test_every_process_of_a_machine_counts(files, monkeypatch):
    machine(monkeypatch, 25 * len(NOISE))
    check_memory(files)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="2 process"):
        check_memory(files)


def test_much_is_said_and_little_is_not(files, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    machine(monkeypatch, 1000 * len(NOISE))
    check_memory(files)
    assert not caplog.records
    machine(monkeypatch, 100 * len(NOISE))
    check_memory(files)
    assert "training keeps them in memory" in caplog.text


def test_a_file_that_cannot_be_read_is_a_problem_and_the_others_are_read(tmp_path):
    folder = tmp_path / "set"
    write_pairs([record(0, text="t")], folder / "part-00001.parquet")
    (folder / "part-00000.parquet").write_bytes(b"PAR1 torn")
    pairs, problems = locate_pairs([str(tmp_path / "none.parquet"), str(folder)])
    assert [pair.record.pair_id for pair in pairs] == ["p0"]
    assert ["not a readable parquet file" in problem.message for problem in problems] == [True, True]


def test_a_video_file_is_decoded_once_and_its_frames_are_counted(tmp_path, monkeypatch):
    write_clip(tmp_path / "c.mp4", pts=range(3))
    load = Mock(side_effect=prompts.load_frames)
    monkeypatch.setattr(prompts, "load_frames", load)
    pair = LocatedPair("f", 0, record(0, video=Video(path="c.mp4")))
    facts = PairInspector(MediaConfig(), "qwen2_vl", str(tmp_path), None).inspect(pair)
    assert load.call_count == 1 and facts.file_frames == {"query": 0, "target": 2}
    assert facts.content == content_id(pair.record, tmp_path)
