# SPDX-License-Identifier: Apache-2.0
"""Filled ids group targets exactly as the masks of training do; what cannot be read is named and left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate.id_job import IdSettings, fill_content_ids
from embedrl_verl.data.files import CARD_FILE, REJECTED_FILE, media_root_of, pair_files
from embedrl_verl.data.identity import content_id
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError

MakePair = Callable[..., PairRecord]
WriteParts = Callable[..., list[Path]]
ReadAll = Callable[[Path], list[PairRecord]]

TEXTS = ("yes", " Yes\n", "ＹＥＳ", "no", "Represent the given image.", "ß", "SS", "")
OWN_IDS = ("", "", "", "own-1", "own-2")
FILES = ("a.png", "b.png", "copy_of_a.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three files, two of them equal; ids look at bytes, so they need not be images."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name, content in zip(FILES, (b"first", b"second", b"first"), strict=True):
        (folder / name).write_bytes(content)
    return folder


def _item(choose: random.Random) -> Item:
    media = [*FILES, b"first", b"second", b"third"]
    text = choose.choice(TEXTS)
    kind = choose.randrange(4)
    if kind == 0:
        return Item(text=text or "t")
    if kind == 1:
        return Item(text=text, images=tuple(choose.choices(media, k=choose.randint(1, 2))))
    if kind == 2:
        return Item(text=text, video=Video(frames=tuple(choose.choices(media, k=choose.randint(1, 2)))))
    return Item(
        text=text, video=Video(path=choose.choice(FILES)), images=tuple(choose.choices(media, k=choose.randint(0, 1)))
    )


def _groups(ids: list[object]) -> list[int]:
    """The number of the first row with the same id, for each row."""
    first: dict[object, int] = {}
    return [first.setdefault(value, row) for row, value in enumerate(ids)]


@pytest.mark.parametrize("seed", range(3))
def test_filled_ids_group_as_the_masks_of_training_do(
    tmp_path: Path, root: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll, seed: int
) -> None:
    choose = random.Random(seed)
    records = [
        pair(
            f"p{i}",
            target=_item(choose),
            target_id=choose.choice(OWN_IDS),
            query=replace(_item(choose), instruction=choose.choice(["", "Find it.", "Answer."])),
            query_id=choose.choice(OWN_IDS),
        )
        for i in range(300)
    ]
    fill_content_ids(write_parts("in", records, [120]), tmp_path / "out", IdSettings(str(root)), workers=1)
    filled = read_all(tmp_path / "out")
    before = [content_id(record, root) for record in records]
    for side in SIDES:
        ids = [getattr(one, side) for one in before]
        assert len(set(ids)) < 200
        assert _groups([getattr(record, f"{side}_id") for record in filled]) == _groups(ids)
        own = [
            (getattr(new, f"{side}_id"), getattr(old, f"{side}_id")) for new, old in zip(filled, records, strict=True)
        ]
        assert all(new == old for new, old in own if old) and all(new for new, _ in own)
    assert [content_id(record, None) for record in filled] == before  # and no medium is needed any more
    bare = {"target_id": "", "query_id": ""}
    assert [replace(record, **bare) for record in filled] == [replace(record, **bare) for record in records]


def test_equal_answers_are_one_content_and_equal_words_with_other_media_are_not(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    generic = "Represent the given image."
    targets = [
        Item(text="Yes"),
        Item(text="yes"),
        Item(text=generic, images=(b"1",)),
        Item(text=generic, images=(b"2",)),
    ]
    records = [pair(f"p{i}", target=target) for i, target in enumerate(targets)]
    report = fill_content_ids(write_parts("in", records), tmp_path / "out", workers=1)
    assert _groups([record.target_id for record in read_all(tmp_path / "out")]) == [0, 0, 2, 3]
    source = report.sources["s"]
    assert (source.pairs, source.text, source.media, source.contents) == (4, 2, 2, 3)
    assert source.false_negatives == pytest.approx(2 / 12)
    assert source.largest[0] == {**source.largest[0], "pairs": 2, "share": 0.5, "text": "Yes"}


def test_overwrite_replaces_the_ids_of_the_source(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    records = [pair("p0", target=Item(text="a"), target_id="x"), pair("p1", target=Item(text="b"), target_id="x")]
    fill_content_ids(write_parts("in", records), tmp_path / "out", IdSettings(overwrite=True), workers=1)
    first, second = read_all(tmp_path / "out")
    assert first.target_id != second.target_id
    assert content_id(first, None) == content_id(replace(records[0], target_id=""), None)


def test_output_does_not_depend_on_processes_nor_ids_on_files(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    records = [pair(f"p{i}", target=Item(text=f"t{i % 7}")) for i in range(900)]
    pieces = write_parts("pieces", records, [300, 1, 299])
    fill_content_ids(pieces, tmp_path / "one", workers=1, rows_per_part=300)
    fill_content_ids(pieces, tmp_path / "two", workers=2, rows_per_part=300)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    fill_content_ids(write_parts("whole", records), tmp_path / "three", workers=1)
    assert read_all(tmp_path / "three") == read_all(tmp_path / "one")


def test_rows_without_their_media_are_named_and_left_out(
    tmp_path: Path, root: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    items = [
        Item(images=("a.png",)),
        Item(images=("a.png", "gone.png")),
        Item(images=("../outside.png",)),
        Item(text="t"),
    ]
    (file,) = write_parts("in", [pair(f"p{i}", target=item) for i, item in enumerate(items)])
    settings = IdSettings(str(root))
    report = fill_content_ids([file], tmp_path / "out", settings, workers=1, max_bad_share=0.5)
    assert (report.exit_code, report.rows, report.rejected) == (DataError.exit_code, 4, 2)
    assert [record.pair_id for record in read_all(tmp_path / "out")] == ["p0", "p3"]
    lines = [json.loads(line) for line in (tmp_path / "out" / REJECTED_FILE).read_text().splitlines()]
    assert [(line["file"], line["row"], line["field"], line["pair_id"]) for line in lines] == [
        (str(file), 1, "target.images[1]", "p1"),
        (str(file), 2, "target.images[0]", "p2"),
    ]
    with pytest.raises(
        DataError, match=r"2 of 4 rows .*over the limit of 25.00%[\s\S]*gone\.png[\s\S]*--max-bad-share"
    ):
        fill_content_ids([file], tmp_path / "strict", settings, workers=1, max_bad_share=0.25)
    with pytest.raises(DataError, match="unfinished"):
        pair_files([tmp_path / "strict"])
    # the limit is no part of what is made: raised, the same folder goes on
    fill_content_ids([file], tmp_path / "strict", settings, workers=1, max_bad_share=0.5)
    assert (tmp_path / "strict/part-00000.parquet").read_bytes() == (tmp_path / "out/part-00000.parquet").read_bytes()


def test_malformed_rows_are_named_and_left_out(tmp_path: Path, pair: MakePair, read_all: ReadAll) -> None:
    write_pairs([pair(f"p{i}") for i in range(3)], tmp_path / "good.parquet")
    rows = pq.read_table(tmp_path / "good.parquet").to_pylist()
    rows[1]["query"]["kind"] = "scan"
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    report = fill_content_ids([file], tmp_path / "out", workers=1, max_bad_share=0.4)
    assert report.rejected == 1
    assert [record.pair_id for record in read_all(tmp_path / "out")] == ["p0", "p2"]
    (line,) = map(json.loads, (tmp_path / "out" / REJECTED_FILE).read_text().splitlines())
    assert (line["row"], line["field"]) == (1, "query")
    assert "kind must be null or 'page'; got 'scan'" in line["reason"]


def test_a_truncated_file_is_named(tmp_path: Path, pair: MakePair, write_parts: WriteParts) -> None:
    (file,) = write_parts("in", [pair(f"p{i}") for i in range(2000)])
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"part-00000\.parquet: not a readable parquet file"):
        fill_content_ids([file], tmp_path / "out", workers=1)
    file.write_bytes(content[:100] + bytes(200) + content[300:])  # whole footer, damaged pages
    with pytest.raises(DataError, match=r"part-00000\.parquet: not a readable parquet file"):
        fill_content_ids([file], tmp_path / "out2", workers=1)


def test_folders_of_several_media_roots_become_one(tmp_path: Path, pair: MakePair, read_all: ReadAll) -> None:
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name / "media").mkdir(parents=True)
        (tmp_path / name / "media" / "x.png").write_bytes(content)
        item = Item(text="t", images=("x.png", b"inline"))
        video = Item(video=Video(frames=("x.png",)))
        records = [
            pair(f"{name}0", target=item),
            replace(pair(f"{name}1", target=video), negatives=(item, Item(text="n"))),
        ]
        write_pairs(records, tmp_path / name / "part-00000.parquet")
        (tmp_path / name / CARD_FILE).write_text(json.dumps({"media_root": "media", "licence": f"licence {name}"}))
    fill_content_ids([tmp_path / "one", tmp_path / "two"], tmp_path / "out", workers=1)
    records = read_all(tmp_path / "out")
    assert records[0].target.images == ("one/media/x.png", b"inline")
    assert records[3].target.video == Video(frames=("two/media/x.png",))
    assert records[3].negatives == (Item(text="t", images=("two/media/x.png", b"inline")), Item(text="n"))
    assert media_root_of(tmp_path / "out") == str(tmp_path)
    assert Counter(content_id(record, None) for record in records).most_common(1)[0][1] == 1
    assert [content_id(record, None) for record in records] == [
        content_id(replace(record, target_id=""), tmp_path) for record in records
    ]
    assert json.loads((tmp_path / "out" / CARD_FILE).read_text())["licence"] == "licence one; licence two"


def test_a_finished_folder_is_not_made_again_and_not_overwritten(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts
) -> None:
    files = write_parts("in", [pair("p0"), pair("p1")])
    report = fill_content_ids(files, tmp_path / "out", workers=1)
    stamp = (tmp_path / "out/part-00000.parquet").stat().st_mtime_ns
    assert fill_content_ids(files, tmp_path / "out", workers=1) == report
    assert (tmp_path / "out/part-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"settings.overwrite was False, is True"):
        fill_content_ids(files, tmp_path / "out", IdSettings(overwrite=True), workers=1)
    with pytest.raises(ConfigError, match="did not write"):
        fill_content_ids(files, tmp_path / "in", workers=1)


def test_queries_and_targets_are_counted_and_either_makes_a_false_negative(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    photo, dog = Item(images=(b"1",)), Item(text="a dog")
    records = [
        pair("p0", query=photo, target=dog),
        pair("p1", query=photo, target=Item(text="a brown dog")),
        pair("p2", query=Item(images=(b"2",)), target=dog),
        pair("p3", query=replace(photo, instruction="Name it."), target=Item(text="Rex")),
    ]
    report = fill_content_ids(write_parts("in", records), tmp_path / "out", workers=1)
    filled = read_all(tmp_path / "out")
    assert _groups([record.query_id for record in filled]) == [0, 0, 2, 3]
    assert _groups([record.target_id for record in filled]) == [0, 1, 0, 3]
    source = report.sources["s"]
    assert (source.queries, source.contents, source.false_negatives) == (3, 3, pytest.approx(4 / 12))
    assert report.lines()[1].split()[6:9] == ["3", "3", "33.33%"]


def test_a_query_whose_media_cannot_be_read_is_named_unless_it_has_an_id(
    tmp_path: Path, root: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    gone = Item(images=("gone.png",))
    files = write_parts("in", [pair("p0", query=gone), pair("p1", query=gone, query_id="x"), pair("p2")])
    fill_content_ids(files, tmp_path / "out", IdSettings(str(root)), workers=1, max_bad_share=0.5)
    assert [record.pair_id for record in read_all(tmp_path / "out")] == ["p1", "p2"]
    (line,) = map(json.loads, (tmp_path / "out" / REJECTED_FILE).read_text().splitlines())
    assert (line["row"], line["field"]) == (0, "query.images[0]")
