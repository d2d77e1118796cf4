# SPDX-License-Identifier: Apache-2.0
"""Filled ids group targets exactly as the masks of training do; what cannot be read is named and left out."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate.split import SplitSettings
from embedrl_verl.curate.split_job import split_pairs
from embedrl_verl.data.files import CARD_FILE, REJECTED_FILE, media_root_of, pair_files
from embedrl_verl.data.identity import content_id
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import SIDES, Item, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError

TEXTS = ("yes", " Yes\n", "ＹＥＳ", "no", "Represent the given image.", "ß", "SS", "")
OWN_IDS = ("", "", "", "own-1", "own-2")
BARE = {"target_id": "", "query_id": ""}
FILES = ("a.png", "b.png", "copy_of_a.png")


@pytest.fixture
def root(tmp_path):
    """Three files, two of them equal; ids look at bytes, so they need not be images."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name, content in zip(FILES, (b"first", b"second", b"first"), strict=True):
        (folder / name).write_bytes(content)
    return folder


def _item(choose):
    media = [*FILES, b"first", b"second", b"third"]
    text = choose.choice(TEXTS)
    kind = choose.randrange(4)
    if kind == 0:
        return Item(text=text or "t")
    if kind == 3:
        images = tuple(choose.choices(media, k=choose.randint(0, 1)))
        return Item(text=text, video=Video(path=choose.choice(FILES)), images=images)
    several = tuple(choose.choices(media, k=choose.randint(1, 2)))
    return Item(text=text, images=several) if kind == 1 else Item(text=text, video=Video(frames=several))


def _groups(ids):
    """The number of the first row with the same id, for each row."""
    first = {}
    return [first.setdefault(value, row) for row, value in enumerate(ids)]


@pytest.mark.parametrize("seed", range(3))
def test_filled_ids_group_as_the_masks_of_training_do(tmp_path, root, pair, write_parts, fill, seed):
    choose, records = random.Random(seed), []
    for i in range(300):
        own = {"target_id": choose.choice(OWN_IDS), "query_id": choose.choice(OWN_IDS)}
        query = replace(_item(choose), instruction=choose.choice(["", "Find it.", "Answer."]))
        records.append(pair(f"p{i}", target=_item(choose), query=query, **own))
    _, filled = fill(write_parts("in", records, [120]), media_root=str(root))
    _, anew = fill([tmp_path / "out"], "anew", media_root=str(root), overwrite=True)
    assert [content_id(one, None) for one in anew] == [content_id(replace(one, **BARE), root) for one in records]
    before = [content_id(record, root) for record in records]
    for side in SIDES:
        ids = [getattr(one, side) for one in before]
        assert len(set(ids)) < 200
        assert _groups([getattr(record, f"{side}_id") for record in filled]) == _groups(ids)
        for new, old in zip(filled, records, strict=True):
            given, found = getattr(old, f"{side}_id"), getattr(new, f"{side}_id")
            assert found and given in ("", found)
    assert [content_id(record, None) for record in filled] == before  # and no medium is needed any more
    assert [replace(record, **BARE) for record in filled] == [replace(record, **BARE) for record in records]


def test_equal_answers_are_one_content_and_equal_words_with_other_media_are_not(pair, write_parts, fill):
    generic = "Represent the given image."
    targets = [Item(text="Yes"), Item(text="yes"), *(Item(text=generic, images=(image,)) for image in (b"1", b"2"))]
    report, filled = fill(write_parts("in", [pair(f"p{i}", target=target) for i, target in enumerate(targets)]))
    assert _groups([record.target_id for record in filled]) == [0, 0, 2, 3]
    source = report.values["sources"]["s"]
    assert (source["pairs"], source["text"], source["media"], source["contents"]) == (4, 2, 2, 3)
    assert source["false_negatives"] == pytest.approx(2 / 12)
    assert source["largest"][0] == {**source["largest"][0], "pairs": 2, "share": 0.5, "text": "Yes"}


def test_queries_and_targets_are_counted_and_either_makes_a_false_negative(pair, write_parts, fill):
    photo, dog = Item(images=(b"1",)), Item(text="a dog")
    records = [
        pair("p0", query=photo, target=dog),
        pair("p1", query=photo, target=Item(text="a brown dog")),
        pair("p2", query=Item(images=(b"2",)), target=dog),
        pair("p3", query=replace(photo, instruction="Name it."), target=Item(text="Rex")),
    ]
    report, filled = fill(write_parts("in", records))
    assert _groups([record.query_id for record in filled]) == [0, 0, 2, 3]
    assert _groups([record.target_id for record in filled]) == [0, 1, 0, 3]
    source = report.values["sources"]["s"]
    assert (source["queries"], source["contents"], source["false_negatives"]) == (3, 3, pytest.approx(4 / 12))
    assert report.lines[1].split()[6:9] == ["3", "3", "33.33%"]


def test_ids_depend_neither_on_processes_nor_on_files(pair, write_parts, fill):
    records = [pair(f"p{i}", target=Item(text=f"t{i % 7}")) for i in range(900)]
    pieces, whole = write_parts("pieces", records, [300, 1, 299]), write_parts("whole", records)
    report, filled = fill(pieces, "one", rows_per_part=300)
    assert fill(pieces, "two", rows_per_part=300, workers=2) == (report, filled) == fill(whole, "three")


def test_rows_that_cannot_be_used_are_named_and_left_out(tmp_path, root, pair, write_parts, fill, rejected):
    gone = Item(images=("a.png", "gone.png"))
    items = [Item(images=("a.png",)), gone, Item(images=("../outside.png",)), Item(text="t")]
    records = [pair(f"p{i}", target=item) for i, item in enumerate(items)]
    records += [pair("p4", query=gone), pair("p5", query=gone, query_id="x"), pair("p6")]
    (file,) = files = write_parts("in", records)
    rows = pq.read_table(file).to_pylist()
    rows[6]["query"]["kind"] = "scan"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    report, filled = fill(files, media_root=str(root), max_bad_share=0.6)
    assert (report.exit_code, report.values["rows"], report.values["rejected"]) == (DataError.exit_code, 7, 4)
    assert [record.pair_id for record in filled] == ["p0", "p3", "p5"]
    wrong = [(1, "target.images[1]"), (2, "target.images[0]"), (4, "query.images[1]"), (6, "query")]
    assert rejected(tmp_path / "out") == wrong
    assert "kind must be null or 'page'; got 'scan'" in (tmp_path / "out" / REJECTED_FILE).read_text()
    with pytest.raises(DataError, match=r"4 of 7 rows .*limit of 25.00%[\s\S]*gone\.png[\s\S]*--max-bad-share"):
        fill(files, "strict", media_root=str(root), max_bad_share=0.25)
    with pytest.raises(DataError, match="unfinished"):
        pair_files([tmp_path / "strict"])
    # the limit is no part of what is made: raised, the same folder goes on
    assert fill(files, "strict", media_root=str(root), max_bad_share=0.6) == (report, filled)


def test_folders_of_several_media_roots_become_one(tmp_path, pair, fill):
    item, video = Item(text="t", images=("x.png", b"inline")), Item(video=Video(frames=("x.png",)))
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name / "media").mkdir(parents=True)
        (tmp_path / name / "media" / "x.png").write_bytes(content)
        other = replace(pair(f"{name}1", target=video), negatives=(item, Item(text="n")))
        write_pairs([pair(f"{name}0", target=item), other], tmp_path / name / "part-00000.parquet")
        (tmp_path / name / CARD_FILE).write_text(json.dumps({"media_root": "media", "licence": f"licence {name}"}))
    _, records = fill([tmp_path / "one", tmp_path / "two"])
    assert records[0].target.images == ("one/media/x.png", b"inline")
    assert records[3].target.video == Video(frames=("two/media/x.png",))
    assert records[3].negatives == (Item(text="t", images=("two/media/x.png", b"inline")), Item(text="n"))
    assert media_root_of(tmp_path / "out") == str(tmp_path)
    ids = [content_id(record, None) for record in records]
    assert len({*ids}) == 4 and ids == [content_id(replace(one, target_id=""), tmp_path) for one in records]
    assert json.loads((tmp_path / "out" / CARD_FILE).read_text())["licence"] == "licence one; licence two"


@pytest.mark.parametrize("command", ["content-ids", "split"])
def test_a_path_of_no_media_root_is_not_looked_for_below_another_inputs(tmp_path, pair, fill, command):
    for name in ("one", "two"):
        targets = [Item(images=("x.png",)), Item(images=(b"inline",))]
        records = [pair(f"{name}{n}", target=target, target_id=f"{n}") for n, target in enumerate(targets)]
        write_pairs(records, tmp_path / name / "part-00000.parquet")
    (tmp_path / "one" / CARD_FILE).write_text(json.dumps({"media_root": "."}))
    both, out = [tmp_path / "one", tmp_path / "two"], tmp_path / "out"
    if command == "content-ids":
        fill(both, max_bad_share=0.5)
    else:
        split_pairs(both, None, out, SplitSettings(rl_from="all", rl_rows_each=0), workers=1, max_bad_share=0.5)
    (line,) = map(json.loads, (out / REJECTED_FILE).read_text().splitlines())
    assert line["pair_id"] == "two0" and "'x.png' is of no media root" in line["reason"]


def test_a_finished_folder_is_not_made_again_and_not_overwritten(tmp_path, pair, write_parts, fill):
    files = write_parts("in", [pair("p0"), pair("p1")])
    found = fill(files)
    stamp = (tmp_path / "out/part-00000.parquet").stat().st_mtime_ns
    assert fill(files) == found
    assert (tmp_path / "out/part-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"settings.overwrite was False, is True"):
        fill(files, overwrite=True)
    with pytest.raises(ConfigError, match="did not write"):
        fill(files, "in")


def test_curation_imports_neither_torch_nor_verl_nor_ray():
    code = "import sys, embedrl_verl.curate.content_ids, embedrl_verl.curate.split_job; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pyarrow" in loaded and not {"torch", "verl", "ray", "transformers"} & set(loaded)
