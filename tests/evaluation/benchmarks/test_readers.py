# SPDX-License-Identifier: Apache-2.0
"""What readers make of rows: names, first occurrences, grades, several positives, instructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb
from embedrl_verl.evaluation.benchmarks.runner import read_task
from embedrl_verl.evaluation.benchmarks.task import Rules, Source, TaskData
from tests.evaluation.benchmarks.world import lines, make


def read(root: Path, name: str, rules: Rules | None = None) -> TaskData:
    return read_task(mmeb_v2.TASKS[name], Source(root), rules or Rules())


def rows(root: Path, name: str, *captions: str) -> None:
    """Two rows whose targets are one picture with these captions."""
    said = {"qry_inst": "<|image_1|>\nFind it.", "tgt_inst": "<|image_1|>\nRepresent it."}
    row = {**said, "qry_text": "q", "qry_img_path": "q.png", "tgt_img_path": ["a.png"]}
    lines(root / mmeb_v2.TASKS[name].repo / name / "test.jsonl", [{**row, "tgt_text": [one]} for one in captions])


@pytest.mark.parametrize(
    ("name", "names"),
    [("WebQA", ["a.png"]), ("RefCOCO-Matching", ["a.png:left", "a.png:right"]), ("DocVQA", ["left", '"right"'])],
)
def test_a_picture_is_one_candidate_but_one_a_caption_where_queries_are_pictures_too(
    name: str, names: list[str], tmp_path: Path
) -> None:
    rows(tmp_path, name, "left", '"right"')
    data = read(tmp_path, name)
    assert list(data.items) == names
    assert data.items[names[0]]().text == "left", "the first of a name is the candidate"


def test_instructions_lose_the_placeholder_and_text_candidates_get_none(tmp_path: Path) -> None:
    for name in ("WebQA", "DocVQA"):
        rows(tmp_path, name, "left")
    page, text = read(tmp_path, "WebQA"), read(tmp_path, "DocVQA")
    assert page.queries[0].item().instruction == "Find it." and not page.queries[0].item().images
    assert page.items["a.png"]().instruction == "Represent it." and text.items["left"]().instruction == ""
    assert text.queries[0].item().images == ("TIGER-Lab/MMEB-V2/image-tasks/q.png",)
    plain = read(tmp_path, "WebQA", Rules(candidate_instruction="none"))
    assert plain.items["a.png"]().instruction == "" and plain.queries[0].item().instruction == "Find it."


def test_of_a_pair_with_two_grades_the_larger_counts_and_zero_is_not_relevant(tmp_path: Path) -> None:
    make(tmp_path, mmeb_v2.TASKS["ViDoSeek-doc"])
    data = read(tmp_path, "ViDoSeek-doc")
    assert [query.grades for query in data.queries] == [{"0": 1.0}, {"1": 1.0}, {"2": 2.0}]
    assert data.items["0"]().kind == "page"


def test_any_of_several_clips_may_be_right(tmp_path: Path) -> None:
    clips = [{"output_path": f"x/{number}.mp4"} for number in range(4)]
    row = {"query": "q", "input_frames": "", "positive_frames": clips[:2], "negative_frames": clips[2:]}
    lines(tmp_path / "VLM2Vec" / "MomentSeeker" / "momentseeker_1k6.jsonl", [row])
    (query,) = read(tmp_path, "MomentSeeker").queries
    assert query.grades == {"x/0.mp4": 1.0, "x/1.mp4": 1.0} and len(query.candidates or ()) == 4


def test_the_local_label_set_is_cut_to_its_published_rows(tmp_path: Path) -> None:
    task = replace(mmeb_v2.TASKS["SmthSmthV2"], queries=2)
    make(tmp_path, task)
    assert len(read_task(task, Source(tmp_path), Rules()).queries) == 2


def test_instances_that_name_what_is_not_there_are_refused(tmp_path: Path) -> None:
    task = uvrb.TASKS["MSRVTT"]
    make(tmp_path, task)
    file = tmp_path / task.repo / "MSRVTT" / "jsonl" / "instances.jsonl"
    for instance, message in (
        ({"qid": "q0", "pos": ["z"]}, r"candidates that the corpus has not: z"),
        ({"qid": "z", "pos": ["c0"]}, r"the query 'z', which queries.jsonl has not"),
    ):
        lines(file, [instance])
        with pytest.raises(DataError, match=message):
            read_task(task, Source(tmp_path), Rules())
