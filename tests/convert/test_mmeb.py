# SPDX-License-Identifier: Apache-2.0
"""MMEB-train: instructions, placeholders, roles of the columns, and rows that must be refused."""

from __future__ import annotations

import pytest

from data_preprocess.mmeb_train import SOURCES, TASKS, MmebTrain
from embedrl_verl.convert.common import split_instruction
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.media_store import media_fields
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, raw_rows
from tests.convert.make_fixtures import MARK, Pen, write_mmeb

IMAGE = "images/OK-VQA/Train/OK-VQA_image_0.jpg"
QUESTION = MARK + "Represent the given image with the following question: What is it?\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmeb")
    write_mmeb(folder, pairs=3, pen=Pen())
    return folder


def pairs(root, **options):
    """set -> [(raw values, record)] of a whole split."""
    found = {name: [] for name in TASKS}
    converter = MmebTrain(**options)
    for row in raw_rows(converter, root):
        found[row.shard.note].append((row.values, converter.convert(row)))
    return found


def convert(name="OK-VQA", negatives=False, **columns):
    values = {"qry": QUESTION, "qry_image_path": IMAGE, "pos_text": "a cab", "pos_image_path": ""} | columns
    return MmebTrain(negatives=negatives).convert(one_row(values, SOURCES[name], name))


@pytest.mark.parametrize("split", ["original", "diverse_instruction"])
def test_instruction_and_text_are_the_string_of_the_row(split, root):
    for name, rows in pairs(root, split=split).items():
        assert len(rows) == 3
        for values, record in rows:
            said = " ".join(part for part in (record.instruction, record.query.text) if part)
            assert said == values["qry"].replace(MARK, "").strip(), name
            if record.target.images:
                shown = " ".join(part for part in (record.target.instruction, record.target.text) if part)
                assert shown == values["pos_text"].replace(MARK, "").strip(), name


def test_an_unknown_wording_is_the_instruction_only_where_the_query_has_no_text_of_its_own(root):
    for name, rows in pairs(root, split="diverse_instruction").items():
        for _, record in rows:
            assert bool(record.query.text) == bool(not record.instruction) == TASKS[name].query_text


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"qry_image_path": ""}, "qry"),
        ({"qry_image_path": "", "qry": QUESTION.removeprefix(MARK)}, "qry_image_path"),
        ({"qry_image_path": None, "qry": "no placeholder"}, "qry_image_path"),
        ({"qry": MARK + "<|image_2|>\nWhat?"}, "qry"),
        ({"qry": MARK + MARK + "What?"}, "qry"),
        ({"qry": MARK + "Represent the given image with the following question: \n"}, "qry"),
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


def test_a_file_without_the_column_of_queries_gives_no_pairs():
    values = {"qry_text": "of the test sets", "qry_image_path": IMAGE, "pos_text": "a", "pos_image_path": ""}
    with pytest.raises(RowError, match="field qry: the column is missing; the row has qry_text, qry_image_path"):
        MmebTrain().convert(one_row(values, note="ImageNet_1K"))


def test_paths_and_texts_may_be_lists_of_one():
    record = convert(qry_image_path=[IMAGE], pos_text=["a cab"], pos_image_path=[])
    assert record == convert()
    assert record.query.images == (IMAGE,)


def test_answers_have_the_id_of_their_words_and_captions_none(root):
    cab = convert(pos_text="A cab.").target_id
    assert cab == convert(pos_text="cab ").target_id != convert(pos_text="bus").target_id
    for name, rows in pairs(root).items():
        for _, record in rows:
            assert bool(record.target_id) == TASKS[name].answers


def test_negatives_are_kept_on_request_unless_they_are_the_answer():
    negative = {"neg_text": "a bus ", "neg_image_path": ""}
    assert convert(**negative).negatives == ()
    assert [item.text for item in convert(negatives=True, **negative).negatives] == ["a bus"]
    assert convert(negatives=True, neg_text="The cab.", neg_image_path="").negatives == ()
    assert convert(negatives=True, neg_text="", neg_image_path="").negatives == ()
    assert convert(negatives=True).negatives == ()  # the columns are missing


def test_the_folder_of_the_images_is_put_before_every_path(root):
    plain, placed = (pairs(root, negatives=True, images_dir=folder) for folder in ("", "a/mmeb"))
    for name in TASKS:
        for (_, one), (_, other) in zip(plain[name], placed[name], strict=True):
            media = [(field, f"a/mmeb/{path}") for field, path, _ in media_fields(one)]
            assert [(field, path) for field, path, _ in media_fields(other)] == media != []
    values = {"qry": QUESTION, "qry_image_path": "/etc/a.jpg", "pos_text": "a", "pos_image_path": ""}
    record = MmebTrain(images_dir="a").convert(one_row(values, note="OK-VQA"))
    assert record.query.images == ("/etc/a.jpg",)  # stays absolute, and is refused by the job


def test_one_split_is_read(root):
    files = [shard.file for shard in MmebTrain().shards(InputRoot(root))]
    assert files == [f"{name}/original-00000-of-00001.parquet" for name in TASKS]


def test_a_set_is_found_in_the_folder_of_all_and_in_its_own(root):
    (whole,) = MmebTrain(("CIRR",)).shards(InputRoot(root))
    (alone,) = MmebTrain(("CIRR",)).shards(InputRoot(root / "CIRR"))
    assert whole.file.endswith(alone.file)
    assert (whole.source, whole.note) == (alone.source, alone.note) == ("mmeb_cirr", "CIRR")


def test_a_file_that_does_not_tell_its_set_must_be_named(root):
    file = root / "CIRR" / "original-00000-of-00001.parquet"
    assert len(MmebTrain(("CIRR",)).shards(InputRoot(file))) == 1
    with pytest.raises(DataError, match="--sets"):
        MmebTrain().shards(InputRoot(file))


def test_a_missing_set_and_an_empty_folder_are_refused(root, tmp_path):
    with pytest.raises(DataError, match="no CIRR/train"):
        MmebTrain(("CIRR", "NIGHTS"), split="train").shards(InputRoot(root))
    with pytest.raises(DataError, match="no <set>/original"):
        MmebTrain().shards(InputRoot(tmp_path))


@pytest.mark.parametrize(("name", "meant"), [("ImageNet-1K", "ImageNet_1K"), ("ok_vqa", "OK-VQA")])
def test_the_name_of_a_test_set_is_refused_with_the_right_one(name, meant):
    with pytest.raises(ConfigError, match=meant):
        MmebTrain((name,))


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="known are"):
        MmebTrain(("TextVQA",))
    with pytest.raises(ConfigError, match="split"):
        MmebTrain(split="test")


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
