# SPDX-License-Identifier: Apache-2.0
"""The scripts of `data_preprocess/` on the fixtures: what is read back, to the pixel, and what becomes of bad rows."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedrl_verl.convert.media_store import map_media, media_fields
from embedrl_verl.data.files import media_root_of
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import SIDES
from tests.convert.conftest import records
from tests.convert.golden import CONVERSIONS, PAIRS, records_of
from tests.convert.make_fixtures import Pen, encoded, write_all

SCRIPTS = Path(__file__).parents[2] / "data_preprocess"
# name in golden.conversions -> script and the options that ask for the same converter
CALLS = {
    "mmeb_original": ("mmeb_train", "mmeb", ["--negatives"]),
    "mmeb_diverse_instruction": ("mmeb_train", "mmeb", ["--split", "diverse_instruction"]),
    "llava_hound": ("llava_hound", "llava_hound", ["--question-lines", str(PAIRS)]),
    "llava_hound_embed_rl": ("llava_hound", "embed_rl", ["--embed-rl"]),
    "colpali_answer": ("colpali_train", "colpali", []),
    "colpali_page": ("colpali_train", "colpali", ["--reading", "page"]),
    "visrag": ("visrag_train", "visrag", []),
}


def run(script: str, root: Path, out: Path, *options: str) -> int:
    """A script in this process, with one worker; returns the exit code."""
    argv = [f"{script}.py", "--input", str(root), "--out", str(out), "--workers", "1", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", CALLS)
def test_a_script_writes_the_records_of_its_converter_in_order(name, roots, tmp_path):
    script, fixture, options = CALLS[name]
    assert run(script, roots[fixture], tmp_path / "out", *options) == 0
    converter, root = CONVERSIONS[name][0], roots[fixture]
    expected = list(records_of(converter, root))
    assert records(tmp_path / "out") == expected


@pytest.mark.parametrize("place", ["keep", "embed", "files"])
@pytest.mark.parametrize("name", ["mmeb_original", "llava_hound", "colpali_page", "visrag"])
def test_media_read_back_have_the_pixels_of_the_source(name, place, roots, tmp_path):
    script, fixture, options = CALLS[name]
    if (name, place) == ("llava_hound", "embed"):
        options = [*options, "--max-bad-share", "1"]  # one of the clips is a video file, which cannot be embedded
    run(script, roots[fixture], tmp_path / "out", "--media", place, *options)
    converter, root = CONVERSIONS[name][0], roots[fixture]
    sources = {record.pair_id: record for record in records_of(converter, root)}
    found = records(tmp_path / "out")
    assert len(found) >= len(sources) - 3
    for record in found:
        source = sources[record.pair_id]
        for side in SIDES:
            theirs = load_item(source.item(side), root, max_frames=64)
            ours = load_item(record.item(side), media_root_of(tmp_path / "out"), max_frames=64)
            for name_of in ("images", "frames"):
                pairs = zip(getattr(theirs, name_of), getattr(ours, name_of), strict=True)
                assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        assert without_media(record) == without_media(source)


def without_media(record):
    return map_media(record, lambda field, media: field)


def test_pairs_of_an_unknown_wording_are_counted_by_source(roots, tmp_path, capsys):
    sets = ["--sets", "OK-VQA", "NIGHTS", "CIRR"]
    assert run("mmeb_train", roots["mmeb"], tmp_path / "out", "--split", "diverse_instruction", *sets) == 0
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["without_instruction"] == {"mmeb_cirr": PAIRS, "mmeb_okvqa": PAIRS}
    said = f"{2 * PAIRS} pairs have no instruction: mmeb_cirr {PAIRS}, mmeb_okvqa {PAIRS}"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out/data_card.md").read_text()
    assert run("mmeb_train", roots["mmeb"], tmp_path / "known", *sets) == 0
    assert json.loads((tmp_path / "known/data_card.json").read_text())["without_instruction"] == {}


def test_files_are_stored_once_by_content(roots, tmp_path):
    assert run("visrag_train", roots["visrag"], tmp_path / "out", "--media", "files") == 0
    names = [media for record in records(tmp_path / "out") for _, media, _ in media_fields(record)]
    assert len(names) == PAIRS
    assert len(set(names)) == PAIRS - 1  # the last two questions are about one page


def test_the_scripts_say_what_they_take():
    for script in ("mmeb_train", "llava_hound", "colpali_train", "visrag_train"):
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / f"{script}.py"), "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "--input" in done.stdout


# Bad rows: each has a place, and a field that the report must name.


def rejected(out: Path) -> dict[tuple[str, int], str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {(entry["file"], entry.get("row", entry.get("line"))): entry["field"] for entry in entries}


def add_rows(file: Path, rows: list[dict]) -> int:
    """Append to a fixture; returns the number of the first new row."""
    table = pq.read_table(file)
    both = table.to_pylist() + [dict.fromkeys(table.schema.names) | row for row in rows]
    pq.write_table(pa.Table.from_pylist(both, schema=table.schema), file)
    return table.num_rows


def check(script, root, out, places, good, *options, file):
    assert run(script, root, out, "--max-bad-share", "1", *options) == 3
    assert rejected(out) == {(file, row): field for row, field in places.items()}
    found = records(out)
    assert len(found) == good
    assert len({record.pair_id for record in found}) == good


def test_bad_rows_of_mmeb_are_named_and_the_good_ones_kept(tmp_path):
    root = write_all(tmp_path / "fixtures", pairs=2)["mmeb"]
    (root / "images/CIRR/Train/torn.jpg").write_bytes(encoded(Pen().picture("12"))[:200])
    (tmp_path / "fixtures/outside.jpg").write_bytes(encoded(Pen().picture("12")))
    good = pq.read_table(root / "CIRR/original-00000-of-00001.parquet").to_pylist()[0]
    bad = [
        ({"qry_image_path": "images/CIRR/Train/missing.jpg"}, "query.images[0]"),
        ({"qry_image_path": "images/CIRR/Train/torn.jpg"}, "query.images[0]"),
        ({"pos_image_path": "../outside.jpg"}, "target.images[0]"),
        ({"pos_image_path": str(tmp_path / "fixtures/outside.jpg")}, "target.images[0]"),
        ({"pos_image_path": ""}, "pos_text"),
        ({"qry_image_path": ""}, "qry"),
        ({"qry": None}, "qry"),
    ]
    file = "CIRR/original-00000-of-00001.parquet"
    first = add_rows(root / file, [good | change for change, _ in bad])
    places = {first + number: field for number, (_, field) in enumerate(bad)}
    check("mmeb_train", root, tmp_path / "out", places, 2, "--sets", "CIRR", file=file)


def test_bad_lines_of_llava_hound_are_named_and_the_good_ones_kept(tmp_path):
    root = write_all(tmp_path / "fixtures", pairs=3)["llava_hound"]
    (root / "train_300k/empty").mkdir()
    (root / "train_300k/torn").mkdir()
    (root / "train_300k/torn/c01_0001.jpeg").write_bytes(b"no image")
    file = root / "video_instruction/train/sft/video_caption_300k.jsonl"
    good = json.loads(file.read_text().splitlines()[0])
    bad = [
        (good | {"video": "missing"}, "video"),
        (good | {"video": "empty"}, "video"),
        (good | {"video": "images/blank.jpg"}, "video"),
        (good | {"video": "torn"}, "query.video.frames[0]"),
        (good | {"conversations": "text"}, "conversations"),
        ({"id": "x", "video": good["video"]}, "conversations"),
        ([], ""),
    ]
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row, _ in bad)
        lines.write('{"id": "torn li')
    places = {4 + number: field for number, (_, field) in enumerate([*bad, ("", "")])}
    name = file.relative_to(root).as_posix()
    check("llava_hound", root, tmp_path / "out", places, 3, "--modes", "caption_retrieval", file=name)


def test_bad_rows_of_documents_are_named_and_an_animation_is_counted(tmp_path):
    root = write_all(tmp_path / "fixtures", pairs=2)["visrag"]
    animation = tmp_path / "two.gif"
    Image.new("L", (40, 40)).save(animation, save_all=True, append_images=[Image.new("L", (40, 40), 255)])
    rows = [
        ({"query": "q", "source": "PlotQA"}, "image"),
        ({"query": "q", "source": "PlotQA", "image": {"bytes": b"torn", "path": None}}, "target.images[0]"),
        ({"query": " ", "source": "PlotQA", "image": {"bytes": b"", "path": None}}, "query"),
        ({"query": "q", "source": "PlotQA", "image": {"bytes": animation.read_bytes(), "path": None}}, None),
    ]
    file = "data/train-00000-of-00001.parquet"
    first = add_rows(root / file, [row for row, _ in rows])
    places = {first + number: field for number, (_, field) in enumerate(rows) if field}
    check("visrag_train", root, tmp_path / "out", places, 3, file=file)
    assert json.loads((tmp_path / "out/data_card.json").read_text())["media"]["animated"] == 1
