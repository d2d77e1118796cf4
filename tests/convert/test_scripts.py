# SPDX-License-Identifier: Apache-2.0
"""The scripts of public sources, run on their fixtures: golden records, media as they were, bad rows by name."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert.media_store import map_media, media_fields
from embedrl_verl.data.files import media_root_of
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import SIDES
from tests.convert.conftest import records, rejected
from tests.convert.golden import CONVERSIONS, FOLDER, PAIRS, readable, records_of
from tests.convert.make_fixtures import Pen, encoded, write_all

SCRIPTS = Path(__file__).parents[2] / "data_preprocess"
CALLS = {
    "mmeb_original": ("mmeb_train", ["--negatives"]),
    "mmeb_diverse_instruction": ("mmeb_train", ["--split", "diverse_instruction"]),
    "llava_hound": ("llava_hound", ["--question-lines", str(PAIRS)]),
    "llava_hound_embed_rl": ("llava_hound", ["--embed-rl"]),
    "colpali_answer": ("colpali_train", []),
    "colpali_page": ("colpali_train", ["--reading", "page"]),
    "visrag": ("visrag_train", []),
}


def run(script: str, root: Path, out: Path, *options: str) -> int:
    """Run a script in this process; the exit code."""
    argv = [f"{script}.py", "--input", str(root), "--out", str(out), "--workers", "1", *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", CALLS)
def test_a_script_writes_the_golden_records_in_order(name, roots, tmp_path):
    (converter, fixture), (script, options) = CONVERSIONS[name], CALLS[name]
    file, found = FOLDER / f"{name}.json", readable(converter, roots[fixture])
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(file.read_text(encoding="utf-8"))
    assert run(script, roots[fixture], tmp_path / "out", *options) == 0
    assert records(tmp_path / "out") == records_of(converter, roots[fixture])


@pytest.mark.parametrize("place", ["keep", "embed", "files"])
@pytest.mark.parametrize("name", ["mmeb_original", "llava_hound", "colpali_page", "visrag"])
def test_media_read_back_have_the_pixels_of_the_source(name, place, roots, tmp_path):
    (converter, fixture), (script, options) = CONVERSIONS[name], CALLS[name]
    # one of the clips is a video file, which cannot be embedded
    run(script, roots[fixture], tmp_path / "out", "--media", place, "--max-bad-share", "1", *options)
    sources = {record.pair_id: record for record in records_of(converter, roots[fixture])}
    found = records(tmp_path / "out")
    assert len(found) == len(sources) - 3 * ((name, place) == ("llava_hound", "embed"))
    for record in found:
        source = sources[record.pair_id]
        for side in SIDES:
            theirs = load_item(source.item(side), roots[fixture], max_frames=64)
            ours = load_item(record.item(side), media_root_of(tmp_path / "out"), max_frames=64)
            pairs = zip(theirs.images + theirs.frames, ours.images + ours.frames, strict=True)
            assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        plain = [map_media(one, lambda field, media: field) for one in (record, source)]
        assert plain[0] == plain[1]
    if (name, place) == ("visrag", "files"):  # the last two questions are about one page, which is stored once
        assert len({media for record in found for _, media, _ in media_fields(record)}) == PAIRS - 1


def test_pairs_of_an_unknown_wording_are_counted_by_source(roots, tmp_path, capsys):
    sets = ["--sets", "OK-VQA", "NIGHTS", "CIRR"]
    assert run("mmeb_train", roots["mmeb"], tmp_path / "out", "--split", "diverse_instruction", *sets) == 0
    said = f"{2 * PAIRS} pairs have no instruction: mmeb_cirr {PAIRS}, mmeb_okvqa {PAIRS}"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out/data_card.md").read_text()
    assert run("mmeb_train", roots["mmeb"], tmp_path / "known", *sets) == 0
    assert json.loads((tmp_path / "known/data_card.json").read_text())["without_instruction"] == {}


def test_bad_rows_of_a_source_are_named_and_the_good_ones_kept(tmp_path):
    root = write_all(tmp_path / "fixtures", pairs=2)["mmeb"]
    (root / "images/CIRR/Train/torn.jpg").write_bytes(encoded(Pen().picture("12"))[:200])
    (tmp_path / "fixtures/outside.jpg").write_bytes(encoded(Pen().picture("12")))
    name = "CIRR/original-00000-of-00001.parquet"
    table = pq.read_table(root / name)
    bad = [
        ({"qry_image_path": "images/CIRR/Train/missing.jpg"}, "query.images[0]"),
        ({"qry_image_path": "images/CIRR/Train/torn.jpg"}, "query.images[0]"),
        ({"pos_image_path": "../outside.jpg"}, "target.images[0]"),
        ({"pos_image_path": str(tmp_path / "fixtures/outside.jpg")}, "target.images[0]"),
        ({"pos_image_path": ""}, "pos_text"),
        ({"qry": None}, "qry"),
    ]
    rows = [*table.to_pylist(), *(table.to_pylist()[0] | change for change, _ in bad)]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / name)
    assert run("mmeb_train", root, tmp_path / "out", "--max-bad-share", "1", "--sets", "CIRR") == 3
    found = [(line["file"], line["row"], line["field"]) for line in rejected(tmp_path / "out")]
    assert found == [(name, row, field) for row, (_, field) in enumerate(bad, start=2)]
    assert len(records(tmp_path / "out")) == 2
