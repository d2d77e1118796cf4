# SPDX-License-Identifier: Apache-2.0
"""ViDoRe's training set in both readings, and VisRAG's."""

from __future__ import annotations

import pytest

from data_preprocess.colpali_train import ColPaliTrain
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.identity import content_id
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, raw_rows, records_of
from tests.convert.make_fixtures import Pen, write_colpali, write_visrag

PAIRS = 10
OPTIONS = "['A. one', 'B. two bars', 'C. three', '-']"


@pytest.fixture(scope="module")
def colpali(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colpali")
    write_colpali(folder, pairs=PAIRS, pen=Pen())
    return folder


@pytest.fixture(scope="module")
def visrag(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visrag")
    write_visrag(folder, pairs=PAIRS, pen=Pen())
    return folder


def convert(reading="answer", answers="clean", **columns):
    values = {
        "image": {"bytes": b"page", "path": "page_9.jpg"},
        "image_filename": "a.pdf/page_9.jpg",
        "query": "How many?\nAnswer briefly.",
        "answer": "12",
        "source": "docvqa",
        "options": None,
        "page": "9",
    } | columns
    return ColPaliTrain(reading, answers).convert(one_row(values))


def test_the_split_test_is_not_read(colpali, tmp_path):
    files = [shard.file for shard in ColPaliTrain().shards(InputRoot(colpali))]
    assert files == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="train-"):
        VisRagTrain().shards(InputRoot(tmp_path))


def test_every_answer_of_the_fixture_says_what_the_page_shows(colpali):
    for row in raw_rows(ColPaliTrain(), colpali):
        record = ColPaliTrain().convert(row)
        assert sum(mark.isdigit() for mark in record.target.text) == 4, row.values["answer"]
        assert not set("[]'") & set(record.target.text)


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({"answer": "['five to ten', 'hours']"}, "five to ten, hours"),
        ({"answer": ["five", "ten"]}, "five, ten"),
        ({"answer": "B", "options": OPTIONS}, "two bars"),
        ({"answer": "B)", "options": OPTIONS}, "two bars"),
        ({"answer": "B. two bars", "options": OPTIONS}, "two bars"),
        ({"answer": "B", "options": "['one', 'two bars']"}, "two bars"),
        ({"answer": "B", "options": None}, "B"),
        ({"answer": " OCTOBER 17, 1995. "}, "OCTOBER 17, 1995."),
    ],
)
def test_clean_answers_are_words_and_not_cells(columns, target):
    record = convert(**columns)
    assert record.target.text == target


@pytest.mark.parametrize("options", ["A. one; B. two bars", "['A. one', 'B. two", 5])
def test_a_letter_beside_options_that_cannot_be_read_is_refused(options):
    for answer in ("B", " (B) "):
        with pytest.raises(RowError, match="field options: must be a list of texts when the answer is a letter"):
            convert(answer=answer, options=options)
    record = convert(answer="two bars", options=options)
    assert record.target.text == "two bars"
    assert convert("page", answer="B", options=options)
    assert convert(answers="raw", answer="B", options=options).target.text == "B"


@pytest.mark.parametrize("options", [None, "", "  "])
def test_a_letter_without_options_is_the_answer_itself(options):
    assert convert(answer="B", options=options).target.text == "B"


def test_raw_answers_are_the_cells_of_the_reference():
    for answer in ("['five to ten', 'hours']", "D"):
        record = convert(answers="raw", answer=answer, options=OPTIONS)
        assert record.target.text == answer


@pytest.mark.parametrize("answer", [None, "", " ", "[]"])
def test_a_row_without_an_answer_serves_the_reading_page_alone(answer):
    assert convert(answer=answer) is None
    assert convert("page", answer=answer)


def test_the_wish_for_a_short_answer_is_left_out_of_page_queries_of_its_two_sources():
    assert convert("answer").query.text == "How many?\nAnswer briefly."
    assert convert("page").query.text == "How many?"
    assert convert("page", source="Infographic-VQA").query.text == "How many?"
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
    ],
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(columns, field):
    with pytest.raises(RowError) as caught:
        convert(**columns)
    assert caught.value.field == field


def test_a_document_of_several_pages_keeps_them_in_order():
    record = convert("page", image=[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}])
    assert record.target.images == (b"1", b"2")
    assert record.target.kind == "page"


def test_questions_about_one_page_have_one_target_id():
    first, same = convert("page"), convert("page", query="What else?", image={"bytes": b"re-encoded"})
    assert first.target_id == same.target_id
    for other in ({"page": "10"}, {"image_filename": "b.pdf/page_9.jpg"}, {"source": "pdf"}):
        assert convert("page", **other).target_id != first.target_id
    assert convert("page", image_filename=None).target_id == ""


def test_answers_have_the_id_of_their_words():
    assert convert(answer="The year 1995.").target_id == convert(answer="year 1995").target_id


def test_the_strings_of_the_benchmark_serve_all_sources_on_request_and_unknown_ones_always(visrag):
    for record in records_of(VisRagTrain("benchmark"), visrag):
        assert record.instruction == "Find a document image that matches the given query:"
        assert record.target.instruction == "Understand the content of the provided document image."
    values = {"query": "q", "image": {"bytes": b"p"}, "source": "Textbooks"}
    record = VisRagTrain().convert(one_row(values))
    assert record.instruction == "Find a document image that matches the given query:"


def test_questions_about_one_page_of_visrag_have_one_content(visrag):
    *others, before, last = (content_id(record, None).target for record in records_of(VisRagTrain(), visrag))
    assert last == before
    assert len({*others, before}) == PAIRS - 1


@pytest.mark.parametrize("values", [{"query": " ", "image": {"bytes": b"p"}}, {"query": "q", "image": ""}])
def test_a_row_of_visrag_needs_query_and_page(values):
    with pytest.raises(RowError):
        VisRagTrain().convert(one_row(values | {"source": "PlotQA"}))


def test_unknown_options_are_refused():
    for make in (lambda: ColPaliTrain("pages"), lambda: ColPaliTrain(answers="x"), lambda: VisRagTrain("x")):
        with pytest.raises(ConfigError, match="one of"):
            make()
