# SPDX-License-Identifier: Apache-2.0
"""MMEB-train: instruction and text, roles and ids of the sets, which files are read, rows that must be refused."""

from __future__ import annotations

import pytest

from data_preprocess.mmeb_train import SOURCES, TASKS, MmebTrain
from embedrl_verl.convert.common import split_instruction
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.media_store import media_fields
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, raw_rows
from tests.convert.make_fixtures import MARK

IMAGE = "images/OK-VQA/Train/OK-VQA_image_0.jpg"
ASKED = MARK + "Represent the given image with the following question: "
QUESTION = ASKED + "What is it?\n"


@pytest.fixture
def root(roots):
    return roots["mmeb"]


def rows_of(root, **options):
    """(set, raw values, record) of a whole split."""
    converter = MmebTrain(**options)
    return [(row.shard.note, row.values, converter.convert(row)) for row in raw_rows(converter, root)]


def convert(name="OK-VQA", options=None, **columns):
    values = {"qry": QUESTION, "qry_image_path": IMAGE, "pos_text": "a cab", "pos_image_path": ""} | columns
    return MmebTrain(**(options or {})).convert(one_row(values, SOURCES[name], name))


@pytest.mark.parametrize("split", ["original", "diverse_instruction"])
def test_instruction_and_text_are_the_string_of_the_row(split, root):
    for name, values, record in rows_of(root, split=split):
        for column, *said in (
            ("qry", record.instruction, record.query.text),
            ("pos_text", record.target.instruction, record.target.text),
        ):
            assert " ".join(filter(None, said)) == values[column].replace(MARK, "").strip(), name
        if split == "diverse_instruction":  # an unknown wording is the instruction only of a query without text
            assert bool(record.query.text) == bool(not record.instruction) == TASKS[name].query_text
        assert bool(record.target_id) == TASKS[name].answers


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"qry_image_path": ""}, "qry"),
        ({"qry_image_path": "", "qry": QUESTION.removeprefix(MARK)}, "qry_image_path"),
        ({"qry_image_path": None, "qry": "no placeholder"}, "qry_image_path"),
        ({"qry": MARK + "<|image_2|>\nWhat?"}, "qry"),
        ({"qry": MARK + MARK + "What?"}, "qry"),
        ({"qry": ASKED + "\n"}, "qry"),
        ({"qry": 7}, "qry"),
        ({"name": "NIGHTS", "qry": None}, "qry"),
        ({"name": "NIGHTS", "qry": MARK}, "qry"),
        ({"qry_image_path": 7}, "qry_image_path"),
        ({"pos_text": " "}, "pos_text"),
        ({"pos_text": None}, "pos_text"),
        ({"pos_text": ["a cab", "a bus"]}, "pos_text"),
        ({"pos_text": MARK + "Represent the given image.\n"}, "pos_text"),
        ({"name": "CIRR", "pos_text": "", "pos_image_path": ""}, "pos_image_path"),
    ],
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(columns, field):
    with pytest.raises(RowError) as caught:
        convert(**columns)
    assert caught.value.field == field


def test_paths_and_texts_may_be_lists_of_one_and_a_missing_column_is_named():
    assert convert(qry_image_path=[IMAGE], pos_text=["a cab"], pos_image_path=[]) == convert()
    with pytest.raises(RowError, match="field qry: the column is missing; the row has qry_text, qry_image_path"):
        MmebTrain().convert(one_row({"qry_text": "of the test sets", "qry_image_path": IMAGE}, note="ImageNet_1K"))


@pytest.mark.parametrize(("text", "kept"), [("a bus ", ["a bus"]), ("The cab.", []), ("", []), (None, [])])
def test_negatives_are_kept_on_request_unless_they_are_the_answer(text, kept):
    columns = {} if text is None else {"neg_text": text, "neg_image_path": ""}
    assert [item.text for item in convert(options={"negatives": True}, **columns).negatives] == kept
    assert convert(**columns).negatives == ()


def test_the_folder_of_the_images_is_put_before_every_path(root):
    plain, placed = (rows_of(root, negatives=True, images_dir=folder) for folder in ("", "a/mmeb"))
    for (_, _, one), (_, _, other) in zip(plain, placed, strict=True):
        media = [(field, f"a/mmeb/{path}") for field, path, _ in media_fields(one)]
        assert [(field, path) for field, path, _ in media_fields(other)] == media != []
    record = convert(options={"images_dir": "a"}, qry_image_path="/etc/a.jpg")
    assert record.query.images == ("/etc/a.jpg",)  # stays absolute, and is refused by the job


def test_which_files_are_read(root, tmp_path):
    files = [shard.file for shard in MmebTrain().shards(InputRoot(root))]
    assert files == [f"{name}/original-00000-of-00001.parquet" for name in TASKS]
    file = "original-00000-of-00001.parquet"  # a set is found in the folder of all, in its own, and alone
    for place, found in ((root, f"CIRR/{file}"), (root / "CIRR", file), (root / "CIRR" / file, file)):
        (shard,) = MmebTrain(("CIRR",)).shards(InputRoot(place))
        assert (shard.file, shard.source, shard.note) == (found, "mmeb_cirr", "CIRR")
    for converter, place, message in (
        (MmebTrain(), root / "CIRR" / file, "--sets"),
        (MmebTrain(("CIRR", "NIGHTS"), split="train"), root, "no CIRR/train"),
        (MmebTrain(), tmp_path, "no <set>/original"),
    ):
        with pytest.raises(DataError, match=message):
            converter.shards(InputRoot(place))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ("ImageNet-1K",)}, "ImageNet_1K"),
        ({"sets": ("ok_vqa",)}, "OK-VQA"),
        ({"sets": ("TextVQA",)}, "known are"),
        ({"split": "test"}, "split"),
    ],
)
def test_an_unknown_set_or_split_is_refused_with_the_right_name(options, message):
    with pytest.raises(ConfigError, match=message):
        MmebTrain(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Find it: a b", ("Find it:", "a b")),
        ("Find it a b", ("Find it", "a b")),
        ("Find it.", ("Find it.", "")),
        ("Find it:\nQ:a\nA:b", ("Find it:", "Q:a\nA:b")),
        ("Find items", ("", "Find items")),
        ("find it: a", ("", "find it: a")),
        ("", ("", "")),
    ],
)
def test_an_instruction_is_split_off_only_where_it_ends_with_a_word(text, expected):
    assert split_instruction(text, "Find it:") == expected
