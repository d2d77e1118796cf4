# SPDX-License-Identifier: Apache-2.0
"""ViDoRe's training set in both readings, VisRAG's, and which answers are the same."""

from __future__ import annotations

import pytest

from data_preprocess.colpali_train import ColPaliTrain, listed, option_letter, without_letter
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.common import LONGEST_PLAIN_ID, answer_id
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, records_of

OPTIONS = "['A. one', 'B. two bars', 'C. three', '-']"


def convert(reading="answer", answers="clean", **columns):
    values = {
        "image": {"bytes": b"page", "path": "page_9.jpg"},
        "image_filename": "a.pdf/page_9.jpg",
        "query": "How many?\nAnswer briefly.",
        "answer": "12",
        "source": "docvqa",
        "options": None,
        "page": "9",
    }
    return ColPaliTrain(reading, answers).convert(one_row(values | columns))


def test_the_split_test_is_not_read(roots, tmp_path):
    files = [shard.file for shard in ColPaliTrain().shards(InputRoot(roots["colpali"]))]
    assert files == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="train-"):
        VisRagTrain().shards(InputRoot(tmp_path))


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({"answer": "['five to ten', 'hours']"}, "five to ten, hours"),
        ({"answer": ["five", "ten"]}, "five, ten"),
        ({"answer": "B", "options": OPTIONS}, "two bars"),
        ({"answer": "B)", "options": OPTIONS}, "two bars"),
        ({"answer": "B. two bars", "options": OPTIONS}, "two bars"),
        ({"answer": "B", "options": "['one', 'two bars']"}, "two bars"),
        ({"answer": "two bars", "options": "['A. one', 'B. two"}, "two bars"),
        ({"answer": "B", "options": None}, "B"),  # without options a letter is the answer itself
        ({"answer": "B", "options": "  "}, "B"),
        ({"answer": " OCTOBER 17, 1995. "}, "OCTOBER 17, 1995."),
        ({"answers": "raw", "answer": "['five to ten', 'hours']"}, "['five to ten', 'hours']"),
        ({"answers": "raw", "answer": "B", "options": OPTIONS}, "B"),
    ],
)
def test_clean_answers_are_words_and_raw_ones_the_cells_of_the_reference(columns, target):
    assert convert(**columns).target.text == target


@pytest.mark.parametrize("answer", [None, "", " ", "[]"])
def test_a_row_without_an_answer_serves_the_reading_page_alone(answer):
    assert convert(answer=answer) is None
    assert convert("page", answer=answer)


def test_the_wish_for_a_short_answer_is_left_out_of_page_queries_of_its_two_sources():
    assert convert("answer").query.text == "How many?\nAnswer briefly."
    assert convert("page").query.text == convert("page", source="Infographic-VQA").query.text == "How many?"
    assert convert("page", source="pdf", query="A\nB").query.text == "A\nB"


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"image": None}, "image"),
        ({"image": []}, "image"),
        ({"image": {"bytes": None, "path": None}}, "image"),
        ({"answer": 7}, "answer"),
        ({"answer": "F", "options": OPTIONS}, "answer"),
        ({"answer": "F", "options": "['one', 'two bars']"}, "answer"),
        *(({"answer": "B", "options": cell}, "options") for cell in ("A. one; B. two", "['A. one', 'B. two", 5)),
        ({"answer": " (B) ", "options": 5}, "options"),
    ],
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(columns, field):
    with pytest.raises(RowError) as caught:
        convert(**columns)
    assert caught.value.field == field
    if field == "options":
        assert convert("page", **columns)


def test_a_document_of_several_pages_keeps_them_in_order():
    record = convert("page", image=[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}])
    assert (record.target.images, record.target.kind) == ((b"1", b"2"), "page")


def test_questions_about_one_page_have_one_target_id():
    first, same = convert("page"), convert("page", query="What else?", image={"bytes": b"re-encoded"})
    assert first.target_id == same.target_id
    for other in ({"page": "10"}, {"image_filename": "b.pdf/page_9.jpg"}, {"source": "pdf"}):
        assert convert("page", **other).target_id != first.target_id
    assert convert("page", image_filename=None).target_id == ""


def test_the_strings_of_the_benchmark_serve_all_sources_on_request_and_unknown_ones_always(roots):
    unknown = VisRagTrain().convert(one_row({"query": "q", "image": {"bytes": b"p"}, "source": "Textbooks"}))
    for record in (unknown, *records_of(VisRagTrain("benchmark"), roots["visrag"])):
        assert record.instruction == "Find a document image that matches the given query:"
        assert record.target.instruction == "Understand the content of the provided document image."


@pytest.mark.parametrize("values", [{"query": " ", "image": {"bytes": b"p"}}, {"query": "q", "image": ""}])
def test_a_row_of_visrag_needs_query_and_page(values):
    with pytest.raises(RowError):
        VisRagTrain().convert(one_row(values | {"source": "PlotQA"}))


@pytest.mark.parametrize("make", [lambda: ColPaliTrain("pages"), lambda: ColPaliTrain(answers="x")])
def test_unknown_options_are_refused(make):
    with pytest.raises(ConfigError, match="one of"):
        make()


SAME = {"A cab.": "cab", "Yes": "yes!", "the  White\nHouse": "White House", "10.5 ": "10.5", "ｔｗｏ": "two"}
SAME |= {'"October 17, 1995."': "OCTOBER 17, 1995", "word " * 1000: "WORD " * 1000 + "."}
OTHER = {"-456": "456", ".5": "5", "1.5": "15", "10%": "10", "5'": "5", "Fox's": "Foxs", "two men": "men", "a": "the"}
OTHER |= {"C++": "C", "word " * 1000: "word " * 1000 + "other"}


def test_answers_have_one_id_where_they_mean_the_same_and_another_in_a_sign_a_unit_or_a_word():
    assert [(one, other) for one, other in SAME.items() if answer_id(one) != answer_id(other)] == []
    assert [(one, other) for one, other in OTHER.items() if answer_id(one) == answer_id(other)] == []
    for text in ("?", "...", "'", "the", '""'):  # marks alone keep an id of their own
        assert answer_id(text) == f"answer:{text}"
    assert len(answer_id("word " * 1000)) < LONGEST_PLAIN_ID


def test_a_list_written_out_as_a_string_is_read_and_nothing_else():
    assert listed("['five to ten hours', 'twelve']") == ["five to ten hours", "twelve"]
    assert (listed("[12, 3.5, ' x ']"), listed(["a"]), listed("[]")) == (["12", "3.5", "x"], ["a"], [])
    for cell in ("plain", "[sic] a quotation", "[sic]", "[[1, 2]]", "['torn", "[__import__('os')]", 7, None):
        assert listed(cell) is None


def test_only_a_lone_letter_names_an_option_and_is_told_from_its_text():
    letters = {"D": "D", "(B)": "B", "A.": "A", "a": None, "D or E": None, "42": None}
    assert {answer: option_letter(answer) for answer in letters} == letters
    options = {"B. two bars": ("B", "two bars"), "(C) 3.5": ("C", "3.5"), "D: x": ("D", "x")}
    options |= {"-": (None, "-"), "A bar": (None, "A bar")}
    assert {option: without_letter(option) for option in options} == options
