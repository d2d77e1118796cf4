# SPDX-License-Identifier: Apache-2.0

import pytest

from embedrl_verl.data.files import (
    begin_work,
    common_media_root,
    media_root_of,
    pair_files,
    part_name,
    write_atomically,
    write_json,
)
from embedrl_verl.errors import ConfigError, DataError


def data_set(folder, *parts):
    folder.mkdir()
    for part in parts:
        (folder / part_name(part)).write_bytes(b"x")
    return folder


def test_a_folder_stands_for_its_parts_in_order(tmp_path):
    folder = data_set(tmp_path / "set", 10, 2, 100_001, 99_999)
    (tmp_path / "own.parquet").write_bytes(b"x")
    found = pair_files([tmp_path / "own.parquet", folder])
    assert found == [tmp_path / "own.parquet", *(folder / part_name(part) for part in (2, 10, 99_999, 100_001))]


def test_an_unfinished_folder_says_how_to_finish_it(tmp_path):
    folder = data_set(tmp_path / "set", 0)
    begin_work(folder, ["python", "my script.py", "--out", "set"])
    with pytest.raises(DataError, match=r"set is unfinished .* finish it with: python 'my script\.py' --out set"):
        pair_files([folder])


def test_paths_that_give_no_file_or_one_twice_are_refused(tmp_path):
    folder = data_set(tmp_path / "set", 0)
    with pytest.raises(DataError, match=r"has no part-\*\.parquet"):
        pair_files([data_set(tmp_path / "empty")])
    with pytest.raises(DataError, match=r"gone\.parquet: no such file or folder"):
        pair_files([tmp_path / "gone.parquet"])
    with pytest.raises(DataError, match="is named twice"):
        pair_files([folder, folder / part_name(0)])


def test_the_media_root_is_the_cards(tmp_path):
    folder = data_set(tmp_path / "set", 0)
    assert media_root_of(folder) is None
    for written, expected in (("media", str(folder / "media")), ("/data/images", "/data/images"), (None, None)):
        write_json(folder / "data_card.json", {"media_root": written})
        assert media_root_of(folder) == media_root_of(folder / part_name(0)) == expected
    (folder / "data_card.json").write_text("{")
    with pytest.raises(DataError, match=r"data_card\.json: cannot be read"):
        media_root_of(folder)


def test_one_root_is_told_for_files_of_which_each_says_it_or_needs_none(tmp_path):
    rooted, bare, silent = (data_set(tmp_path / name, 0) for name in ("rooted", "bare", "silent"))
    write_json(rooted / "data_card.json", {"media_root": "/data/images"})
    write_json(bare / "data_card.json", {"media_root": None})
    assert common_media_root([rooted, bare]) == "/data/images" and common_media_root([silent]) is None
    with pytest.raises(ConfigError, match="silent has no data card, .* /data/images; set data.media_root"):
        common_media_root([rooted, silent])
    write_json(silent / "data_card.json", {"media_root": "/other"})
    with pytest.raises(ConfigError, match="must have one media root; got /data/images, /other"):
        common_media_root([rooted, silent])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "f"
    write_atomically(target, "old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
