# SPDX-License-Identifier: Apache-2.0
"""Filled ids group targets exactly as the masks of training do; what cannot be read is named and left out."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from embedrl_verl.data.files import CARD_FILE, media_root_of
from embedrl_verl.data.identity import content_id
from embedrl_verl.data.schema import SIDES, Item, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError
from tests.curate.conftest import fill, pair, rejected, split, spoil, write_parts

TEXTS = ("yes", " Yes\n", "ＹＥＳ", "no", "Represent the given image.", "ß", "SS", "")
OWN_IDS = ("", "", "", "own-1", "own-2")
BARE = {"target_id": "", "query_id": ""}
FILES = ("a.png", "b.png", "copy_of_a.png")


@pytest.fixture
def root(folder):
    """Three files, two of them equal; ids look at bytes, so they need not be images."""
    (folder / "media").mkdir()
    for name, content in zip(FILES, (b"first", b"second", b"first"), strict=True):
        (folder / "media" / name).write_bytes(content)
    return folder / "media"


def item(choose):
    """Texts, images, frames and files of which many are equal in content."""
    images, frames = (tuple(choose.choices([*FILES, b"first", b"third"], k=choose.randint(0, 1))) for _ in range(2))
    video = choose.choice([None, Video(frames=frames or ("b.png", b"first")), Video(path=choose.choice(FILES))])
    return Item(text=choose.choice(TEXTS) or ("" if images or video else "t"), images=images, video=video)


def groups(ids):
    """The number of the first row with the same id, for each row."""
    first = {}
    return [first.setdefault(value, row) for row, value in enumerate(ids)]


@pytest.mark.parametrize("seed", range(3))
def test_filled_ids_group_as_the_masks_of_training_do(root, seed):
    choose, records = random.Random(seed), []
    for i in range(300):
        own = {"target_id": choose.choice(OWN_IDS), "query_id": choose.choice(OWN_IDS)}
        query = replace(item(choose), instruction=choose.choice(["", "Find it.", "Answer."]))
        records.append(pair(f"p{i}", target=item(choose), query=query, **own))
    _, filled = fill(write_parts("in", records, [120]), media_root=str(root))
    _, anew = fill(["out"], "anew", media_root=str(root), overwrite=True)
    assert [content_id(one, None) for one in anew] == [content_id(replace(one, **BARE), root) for one in records]
    before = [content_id(record, root) for record in records]
    for side in SIDES:
        ids = [getattr(one, side) for one in before]
        assert len(set(ids)) < 200
        assert groups([getattr(record, f"{side}_id") for record in filled]) == groups(ids)
        for new, old in zip(filled, records, strict=True):
            given, found = getattr(old, f"{side}_id"), getattr(new, f"{side}_id")
            assert found and given in ("", found)
    assert [content_id(record, None) for record in filled] == before  # and no medium is needed any more
    assert [replace(record, **BARE) for record in filled] == [replace(record, **BARE) for record in records]


def test_queries_and_targets_are_counted_and_either_makes_a_false_negative():
    photo, generic, dog = Item(images=(b"1",)), "Represent the given image.", Item(text="a dog")
    records = [
        pair("p0", query=photo, target=dog),
        pair("p1", query=photo, target=Item(text=generic, images=(b"1",))),
        pair("p2", query=Item(images=(b"2",)), target=Item(text="A  dog")),
        pair("p3", query=replace(photo, instruction="Name it."), target=Item(text=generic, images=(b"2",))),
        pair("p4", query_id="own", target_id="own"),
    ]
    report, filled = fill(write_parts("in", records))
    assert groups([record.query_id for record in filled]) == [0, 0, 2, 3, 4]
    assert groups([record.target_id for record in filled]) == [0, 1, 0, 3, 4]
    source = report.values["sources"]["s"]
    counts = {"pairs": 5, "given": 1, "text": 2, "media": 2, "near": 0, "contents": 4, "queries": 4}
    assert source == {**source, **counts, "false_negatives": pytest.approx(4 / 20)}
    assert source["largest"][0] == {"pairs": 2, "share": 0.4, "target_id": filled[0].target_id, "text": "a dog"}
    assert report.lines[1].split()[1:9] == ["5", "1", "2", "2", "0", "4", "4", "20.00%"]


def test_ids_depend_neither_on_processes_nor_on_files():
    records = [pair(f"p{i}", target=Item(text=f"t{i % 7}")) for i in range(900)]
    pieces, whole = write_parts("pieces", records, [300, 1, 299]), write_parts("whole", records)
    found = fill(pieces, "one", rows_per_part=300)
    assert fill(pieces, "two", rows_per_part=300, workers=2) == found == fill(whole, "three")


def test_rows_that_cannot_be_used_are_named_and_left_out(root):
    gone = Item(images=("a.png", "gone.png"))
    items = [Item(images=("a.png",)), gone, Item(images=("../outside.png",)), Item(text="t")]
    records = [pair(f"p{i}", target=target) for i, target in enumerate(items)]
    records += [pair("p4", query=gone), pair("p5", query=gone, query_id="x"), pair("p6")]
    (file,) = files = write_parts("in", records)
    spoil(file, lambda rows: rows[6]["query"].update(kind="scan"))
    report, filled = fill(files, media_root=str(root), max_bad_share=0.6)
    assert (report.exit_code, report.values["rows"], report.values["rejected"]) == (DataError.exit_code, 7, 4)
    assert [record.pair_id for record in filled] == ["p0", "p3", "p5"]
    places = [(1, "target.images[1]"), (2, "target.images[0]"), (4, "query.images[1]"), (6, "query")]
    assert [(line["row"], line["field"]) for line in rejected("out")] == places
    assert "kind must be null or 'page'; got 'scan'" in rejected("out")[3]["reason"]
    with pytest.raises(DataError, match=r"4 of 7 rows .*limit of 25.00%[\s\S]*gone\.png[\s\S]*--max-bad-share"):
        fill(files, "strict", media_root=str(root), max_bad_share=0.25)


def test_folders_of_several_media_roots_become_one(folder):
    both, video = Item(text="t", images=("x.png", b"inline")), Item(video=Video(frames=("x.png",)))
    for name, content in (("one", b"1"), ("two", b"2")):
        Path(name, "media").mkdir(parents=True)
        Path(name, "media", "x.png").write_bytes(content)
        other = pair(f"{name}1", target=video, negatives=(both, Item(text="n")))
        write_pairs([pair(f"{name}0", target=both), other], f"{name}/part-00000.parquet")
        Path(name, CARD_FILE).write_text(json.dumps({"media_root": "media", "licence": f"licence {name}"}))
    _, records = fill([folder / "one", folder / "two"])
    assert records[0].target.images == ("one/media/x.png", b"inline")
    assert records[3].target.video == Video(frames=("two/media/x.png",))
    assert records[3].negatives == (Item(text="t", images=("two/media/x.png", b"inline")), Item(text="n"))
    assert media_root_of("out") == str(folder)
    ids = [content_id(record, None) for record in records]
    assert len({*ids}) == 4 and ids == [content_id(replace(one, target_id=""), folder) for one in records]
    assert json.loads(Path("out", CARD_FILE).read_text())["licence"] == "licence one; licence two"


@pytest.mark.parametrize("command", ["content-ids", "split"])
def test_a_path_of_no_media_root_is_not_looked_for_below_another_inputs(command):
    for name in ("one", "two"):
        targets = [Item(images=("x.png",)), Item(images=(b"inline",))]
        records = [pair(f"{name}{n}", target=target, target_id=f"{n}") for n, target in enumerate(targets)]
        write_pairs(records, f"{name}/part-00000.parquet")
    Path("one", CARD_FILE).write_text(json.dumps({"media_root": "."}))
    if command == "content-ids":
        _, kept = fill(["one", "two"], max_bad_share=0.5)
    else:
        _, kept, _ = split(["one", "two"], None, max_bad_share=0.5, rl_from="all", rl_rows_each=0)
    assert [record.pair_id for record in kept] == ["one0", "one1", "two1"]
    (line,) = rejected("out")
    assert line["pair_id"] == "two0" and "'x.png' is of no media root" in line["reason"]


def test_a_finished_folder_is_not_made_again_nor_with_other_settings():
    files, part = write_parts("in", [pair("p0"), pair("p1")]), Path("out/part-00000.parquet")
    found = fill(files)
    stamp = part.stat().st_mtime_ns
    assert fill(files) == found and part.stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"settings.overwrite was False, is True"):
        fill(files, overwrite=True)


def test_curation_imports_neither_torch_nor_verl_nor_ray():
    code = "import sys, embedrl_verl.curate.content_ids, embedrl_verl.curate.split_job; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pyarrow" in loaded and not {"torch", "verl", "ray", "transformers"} & set(loaded)
