# SPDX-License-Identifier: Apache-2.0
"""What is found out about pairs before training is kept, and counts only while nothing is changed."""

import os
from dataclasses import replace
from unittest.mock import Mock

import pytest
from PIL import Image

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data import inspection, prompts
from embedrl_verl.data.identity import content_id
from embedrl_verl.data.inspection import PairInspector, inspect_rows
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.data.writer import write_pairs
from tests.data.clips import write_clip


def record(number, **target):
    return PairRecord(f"p{number}", "s", "find", Item(text="q"), Item(**target), "")


def draw(path, grey):
    Image.new("L", (40, 40), grey).save(path)


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """`looked(**changes)`: facts and faults of three pairs, and how many were looked at for them."""
    for name in "abc":
        draw(tmp_path / f"{name}.png", ord(name))
    write_pairs([record(i, images=(f"{name}.png",)) for i, name in enumerate("abc")], tmp_path / "p.parquet")
    look = Mock(side_effect=inspection.load_prompt_media)
    monkeypatch.setattr(inspection, "load_prompt_media", look)
    inspector = PairInspector(MediaConfig(), "qwen2_vl", str(tmp_path), None)

    def start(rows=(0, 1, 2), **changes):
        before = look.call_count
        facts, errors = inspect_rows(PairTable([tmp_path / "p.parquet"]), rows, replace(inspector, **changes), 2)
        return facts, errors, (look.call_count - before) // 2

    return start


def test_a_second_start_looks_at_nothing_and_knows_the_same(looked):
    facts, errors, count = looked()
    assert count == 3 and not errors and facts["row"].tolist() == [0, 1, 2]
    again, errors, count = looked((2, 0))
    assert count == 0 and not errors and again.tobytes() == facts[[2, 0]].tobytes()


def test_rows_that_another_start_did_not_need_are_looked_at_then(looked):
    assert looked((1,))[2] == 1
    assert looked()[2] == 2


@pytest.mark.parametrize("change", ["medium", "file", "settings", "family", "code"])
def test_what_is_changed_is_looked_at_again(looked, tmp_path, monkeypatch, change):
    assert looked()[2] == 3
    changes = {}
    if change == "medium":
        draw(tmp_path / "b.png", 7)
        os.utime(tmp_path / "b.png", (1, 1))
    elif change == "file":
        write_pairs([record(i, images=("a.png",)) for i in range(3)], tmp_path / "p.parquet")
    elif change == "settings":
        changes["settings"] = MediaConfig(image_max_tokens=700)
    elif change == "family":
        changes["family"] = "qwen2_5_vl"
    else:
        monkeypatch.setattr(inspection, "_own_code", lambda: "other")
    assert looked(**changes)[2] == 3


def test_a_root_in_the_home_folder_is_looked_up_there(looked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    root = {"media_root": f"~/{tmp_path.name}"}
    assert [looked(**root)[2] for _ in range(2)] == [3, 0]
    draw(tmp_path / "b.png", 7)
    assert looked(**root)[2] == 3


def test_what_is_kept_may_be_damaged_or_not_writable(looked, monkeypatch, caplog):
    looked()
    for kept in inspection.cache_folder().glob("checked-*.npy"):
        kept.write_bytes(kept.read_bytes()[:-20])
    assert looked()[2] == 3 and "is damaged" in caplog.text
    monkeypatch.setattr(inspection, "publish", Mock(side_effect=OSError(28, "full")))
    facts, errors, _ = looked(family="qwen2_5_vl")
    assert len(facts) == 3 and not errors and "cannot be written" in caplog.text


def test_a_fault_is_told_again_until_it_is_mended(looked, tmp_path):
    (tmp_path / "b.png").write_bytes(b"torn")
    for _ in range(2):
        facts, (error,), _ = looked()
        assert facts["row"].tolist() == [0, 2] and "row 1, pair 'p1', field target: media path 'b.png'" in error
    draw(tmp_path / "b.png", 1)
    assert not looked()[1]


def test_a_video_file_is_decoded_once_and_its_frames_are_counted(tmp_path, monkeypatch):
    write_clip(tmp_path / "c.mp4", pts=range(3))
    load = Mock(side_effect=prompts.load_frames)
    monkeypatch.setattr(prompts, "load_frames", load)
    pair = LocatedPair("f", 0, record(0, video=Video(path="c.mp4")))
    facts = PairInspector(MediaConfig(), "qwen2_vl", str(tmp_path), None).inspect(pair)
    assert load.call_count == 1 and facts.file_frames == {"query": 0, "target": 2}
    assert facts.content == content_id(pair.record, tmp_path)
