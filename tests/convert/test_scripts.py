# SPDX-License-Identifier: Apache-2.0
"""The scripts of public sources, run on their fixtures: golden records, media as they were, all to be trained on.

`WRITE_GOLDEN=1 pytest tests/convert/test_scripts.py` writes golden/*.json anew; look at the difference before
committing it. Encoded media are named in them by the place in the fixture that they come from, whatever the encoder.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from embedrl_verl.convert.media_store import map_media, media_fields
from embedrl_verl.data.dataset import TCoTDataset
from embedrl_verl.data.files import media_root_of, pair_files
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import SIDES, PairRecord
from recipes.tiny_digits.models import build_tiny_model
from tests.convert.conftest import MMEB_SOURCES, OTHER_SOURCES, PAIRS, records, run_script
from tests.convert.make_fixtures import write_all

# Golden file: fixture, script and its options.
CALLS: dict[str, tuple[str, ...]] = {
    "mmeb_original": ("mmeb", "mmeb_train", "--negatives"),
    "mmeb_diverse_instruction": ("mmeb", "mmeb_train", "--split", "diverse_instruction"),
    "llava_hound": ("llava_hound", "llava_hound", "--question-lines", str(PAIRS)),
    "llava_hound_embed_rl": ("embed_rl", "llava_hound", "--embed-rl"),
    "colpali_answer": ("colpali", "colpali_train"),
    "colpali_page": ("colpali", "colpali_train", "--reading", "page"),
    "visrag": ("visrag", "visrag_train"),
}


def readable(found: list[PairRecord]) -> list[Any]:
    """The records as JSON values, without what is empty; of MMEB's sets the first two rows."""
    plain = []
    for record in found:
        _, file, row = record.pair_id.split(":")
        if not record.data_source.startswith("mmeb_") or int(row) < 2:
            plain.append(named(asdict(record), f"{file}.parquet:{row}"))
    return plain


def named(value: Any, place: str) -> Any:
    if isinstance(value, bytes):
        return f"bytes of {place}"
    if isinstance(value, dict):
        return {key: named(part, place) for key, part in value.items() if part not in ("", None, (), [])}
    return [named(part, place) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", CALLS)
def test_a_script_writes_the_golden_records_in_order(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    (fixture, script, *options), file = CALLS[name], Path(__file__).parent / "golden" / f"{name}.json"
    assert run_script(script, roots[fixture], tmp_path / "out", *options) == 0
    found = readable(records(tmp_path / "out"))
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", ["embed", "files"])
@pytest.mark.parametrize("name", ["mmeb_original", "llava_hound", "colpali_page", "visrag"])
def test_media_read_back_have_the_pixels_of_the_source(
    name: str, place: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    fixture, script, *options = CALLS[name]
    run_script(script, roots[fixture], tmp_path / "keep", *options)
    # one of the clips is a video file, which cannot be embedded
    run_script(script, roots[fixture], tmp_path / "out", "--media", place, "--max-bad-share", "1", *options)
    sources, found = {record.pair_id: record for record in records(tmp_path / "keep")}, records(tmp_path / "out")
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


def test_pairs_of_an_unknown_wording_are_counted_by_source(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--sets", "OK-VQA", "NIGHTS", "CIRR"]
    assert run_script("mmeb_train", roots["mmeb"], tmp_path / "out", "--split", "diverse_instruction", *sets) == 0
    said = f"{2 * PAIRS} pairs have no instruction: mmeb_cirr {PAIRS}, mmeb_okvqa {PAIRS}"
    assert said in capsys.readouterr().out
    assert run_script("mmeb_train", roots["mmeb"], tmp_path / "known", *sets) == 0
    assert json.loads((tmp_path / "known/data_card.json").read_text())["without_instruction"] == {}


def test_all_26_data_sources_load_for_training_with_every_pair_and_one_media_root(tmp_path: Path) -> None:
    roots = write_all(tmp_path / "fixtures", pairs=3)
    moved = {"mmeb": ["--images-dir", "mmeb"], "llava_hound": ["--frames-dir", "llava_hound/train_300k"]}
    folders = []
    for name in ("mmeb_original", "llava_hound", "colpali_answer", "colpali_page", "visrag"):
        fixture, script, *options = CALLS[name]
        options = ["--question-lines", "3"] if name == "llava_hound" else options
        place = ["--media-root", str(tmp_path / "fixtures"), *moved.get(fixture, [])]
        assert run_script(script, roots[fixture], tmp_path / name, *place, *options) == 0
        folders.append(tmp_path / name)
    build_tiny_model(tmp_path / "model", seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    limits = {"image_min_tokens": 1, "image_max_tokens": 16, "frame_min_tokens": 1, "frame_max_tokens": 16}
    config = {"media_root": str(tmp_path / "fixtures"), "max_prompt_length": 256}
    files = [str(file) for file in pair_files(folders)]
    embedrl = {"prompt_style": "compact", **limits}
    dataset = TCoTDataset(files, processor.tokenizer, {**config, "embedrl": embedrl}, processor)
    assert Counter(dataset.pair_sources) == dict.fromkeys((*MMEB_SOURCES, *OTHER_SOURCES), 3)
    assert not dataset.overlong
