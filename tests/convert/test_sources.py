# SPDX-License-Identifier: Apache-2.0
"""Rows of the public sources: what they become, which files are read, and the field of what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_preprocess.colpali_train import ColPaliTrain, listed, split_option
from data_preprocess.llava_hound import LlavaHound, frame_indices
from data_preprocess.mmeb_train import SOURCES, TASKS, MmebTrain
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.common import LONGEST_PLAIN_ID, answer_id, split_instruction
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.data.schema import Item, Video
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.conftest import one_row
from tests.convert.make_fixtures import MARK

IMAGE = "images/OK-VQA/Train/OK-VQA_image_0.jpg"
ASKED = MARK + "Represent the given image with the following question: "
HUMAN, GPT = "<video>\nWhat is shown?", "A number."
SIDES = (("query", "qry"), ("target", "pos"))
OPTIONS = "['A. one', 'B. two bars', 'C. three', '-']"


@pytest.fixture
def videos(tmp_path):
    """A media root with `train_300k/clip` of one frame, `long` of 16, `empty` without, a film, and a clip outside."""
    folder = tmp_path / "root/train_300k"
    for place in (folder / "clip", folder / "empty", tmp_path / "outside"):
        place.mkdir(parents=True)
    for file in (folder / "clip/c01_0001.jpeg", folder / "clip/notes.txt", tmp_path / "outside/c01_0001.jpeg"):
        file.touch()
    (folder / "long").mkdir()
    for name in ("film.mp4", *(f"long/{number}.jpg" for number in range(1, 17))):
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


def turns(*said):
    return [{"from": speaker, "value": value} for speaker, value in said]


def mmeb(_=None, name="OK-VQA", negatives=False, images_dir="", **columns):
    row = {"qry": ASKED + "What is it?\n", "qry_image_path": IMAGE, "pos_text": "a cab", "pos_image_path": ""}
    converter = MmebTrain(negatives=negatives, images_dir=images_dir)
    return converter.convert(one_row(row | columns, SOURCES[name], name))


def hound(videos, mode="caption_retrieval", frames=8, **columns):
    row = {"id": "clip", "video": "clip", "conversations": turns(("human", HUMAN), ("gpt", GPT))}
    return LlavaHound(frames=frames).convert(one_row(row | columns, f"llavahound_{mode}", mode, videos))


def copied(_=None, mode="qa", **columns):
    asks, says = turns(("human", HUMAN)), turns(("gpt", GPT))
    row = {"dataset_name": f"llavahound_{mode}", "qry": {"conversations": asks, "video": ["v/1.jpeg"]}}
    row["pos"] = {"conversations": says, "video": ["images/blank.jpg"]}
    return LlavaHound(embed_rl=True).convert(one_row(row | columns, "llavahound_qa", "qa"))


def answer(_=None, answers="clean", reading="answer", **columns):
    row = {"image": {"bytes": b"page", "path": "page_9.jpg"}, "image_filename": "a.pdf/page_9.jpg", "page": "9"}
    row |= {"query": "How many?\nAnswer briefly.", "answer": "12", "source": "docvqa", "options": None}
    return ColPaliTrain(reading, answers).convert(one_row(row | columns))


def page(_=None, **columns):
    return answer(reading="page", **columns)


def visrag(_=None, prompts="by_source", **columns):
    row = {"query": "q", "image": {"bytes": b"p"}, "source": "PlotQA"}
    return VisRagTrain(prompts).convert(one_row(row | columns))


ASKS, SAYS = turns(("human", HUMAN)), turns(("gpt", GPT))
BAD = {
    mmeb: [
        ({"qry_image_path": ""}, "qry"),
        ({"qry_image_path": "", "qry": "no placeholder"}, "qry_image_path"),
        *(({"qry": text}, "qry") for text in (MARK + "<|image_2|>\nWhat?", MARK + MARK + "What?", ASKED + "\n", 7)),
        *(({"name": "NIGHTS", "qry": text}, "qry") for text in (None, MARK)),
        ({"qry_image_path": 7}, "qry_image_path"),
        *(({"pos_text": text}, "pos_text") for text in (" ", None, ["a cab", "a bus"], MARK + "Represent it.\n")),
        ({"name": "CIRR", "pos_text": "", "pos_image_path": ""}, "pos_image_path"),
    ],
    hound: [
        *(({"video": name}, "video") for name in ("images/blank.jpg", "", None, ["a", "b"], "missing", "empty")),
        *(({"video": name}, "video") for name in ("../../outside", "clip\0", "link")),
        *(({"conversations": value}, "conversations") for value in ([], "a", ASKS)),
        ({"conversations": ["a"]}, "conversations[0]"),
        ({"conversations": turns(("human", "<video>\n"), ("gpt", GPT))}, "conversations"),
        ({"conversations": turns(("human", HUMAN), ("gpt", None))}, "conversations[1].value"),
        ({"conversations": [{"value": "a"}]}, "conversations[0].from"),
    ],
    copied: [
        ({"dataset_name": "MSCOCO"}, "dataset_name"),
        ({"qry": None}, "qry"),
        ({"qry": {"conversations": ASKS, "video": ["images/blank.jpg"]}}, "qry.video"),
        ({"qry": {"conversations": ASKS, "video": "images/blank.jpg"}}, "qry.video"),
        ({"qry": {"conversations": SAYS, "video": ["v/1.jpeg"]}}, "qry.conversations"),
        ({"pos": {"conversations": ASKS, "video": []}}, "pos.conversations"),
        ({"pos": {"conversations": SAYS, "video": ["v/2.jpeg"]}}, "video"),
    ],
    answer: [
        *(({"query": text}, "query") for text in ("", None)),
        *(({"image": image}, "image") for image in (None, [], {"bytes": None, "path": None})),
        ({"answer": 7}, "answer"),
        *(({"answer": "F", "options": cell}, "answer") for cell in (OPTIONS, "['one', 'two bars']")),
        *(({"answer": "B", "options": cell}, "options") for cell in ("A. one; B. two", "['A. one', 'B. two", 5)),
        ({"answer": " (B) ", "options": 5}, "options"),
    ],
    visrag: [({"query": " "}, "query"), ({"image": ""}, "image")],
}


@pytest.mark.parametrize(
    ("source", "columns", "field"), [(source, *case) for source, cases in BAD.items() for case in cases]
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(videos, source, columns, field):
    assert source(videos)  # a good one
    with pytest.raises(RowError) as caught:
        source(videos, **columns)
    assert caught.value.field == field


OF_CIRR = {f"{side}_image_path": f"{side}.jpg" for side in ("qry", "pos", "neg")} | {"name": "CIRR", "pos_text": ""}
NEGATIVE = {"negatives": True, "neg_image_path": ""}
RAW = {"answers": "raw", "answer": "['five to ten', 'hours']"}
PROMPT = "Understand the content of the provided video"
BENCHMARK = "Find a document image that matches the given query:"
BECOMES = {
    mmeb: [
        ({"qry_image_path": [IMAGE], "pos_text": ["a cab"], "pos_image_path": []}, "target.text", "a cab"),
        ({"neg_text": "a bus "}, "negatives", ()),
        ({"negatives": True}, "negatives", ()),
        (NEGATIVE | {"neg_text": "a bus "}, "negatives", (Item("a bus"),)),
        *((NEGATIVE | {"neg_text": text}, "negatives", ()) for text in ("The cab.", "")),
        *((OF_CIRR | {"images_dir": "a/b"}, f"{side}.images", (f"a/b/{name}.jpg",)) for side, name in SIDES),
        (OF_CIRR | {"images_dir": "a", "negatives": True, "neg_text": ""}, "negatives", (Item(images=("a/neg.jpg",)),)),
        ({"images_dir": "a", "qry_image_path": "/b.jpg"}, "query.images", ("/b.jpg",)),  # which the job refuses
    ],
    hound: [
        ({}, "query.video", Video(frames=("train_300k/clip/c01_0001.jpeg",))),
        ({"video": ["clip"]}, "query.video", Video(frames=("train_300k/clip/c01_0001.jpeg",))),
        *(({"video": name}, "query.video", Video(path="train_300k/film.mp4")) for name in ("film", "film.mp4")),
        *(
            ({"video": "long", "frames": count}, "query.video.frames", tuple(f"train_300k/long/{i}.jpg" for i in kept))
            for count, kept in ((8, (1, 3, 5, 7, 9, 11, 13, 16)), (0, range(1, 17)))  # in natural order
        ),
        ({"conversations": turns(("gpt", GPT), ("human", HUMAN), ("gpt", "later"))}, "target.text", GPT),
        *(({"mode": mode}, "target_id", "video:clip") for mode in ("caption_retrieval", "video_retrieval")),
        ({"mode": "qa"}, "target_id", "answer:number"),
        ({"mode": "video_retrieval"}, "target.instruction", f"{PROMPT}:"),
        (
            {"mode": "video_retrieval", "conversations": turns(("human", f"{PROMPT}, please."), ("gpt", GPT))},
            "target.instruction",
            f"{PROMPT}, please.",
        ),
    ],
    answer: [
        ({"answer": "['five to ten', 'hours']"}, "target.text", "five to ten, hours"),
        ({"answer": ["five", "ten"]}, "target.text", "five, ten"),
        *(({"answer": text, "options": OPTIONS}, "target.text", "two bars") for text in ("B", "B)", "B. two bars")),
        ({"answer": "B", "options": "['one', 'two bars']"}, "target.text", "two bars"),
        ({"answer": "two bars", "options": "['A. one', 'B. two"}, "target.text", "two bars"),
        *(({"answer": "B", "options": cell}, "target.text", "B") for cell in (None, "  ", "['A', 'B']")),
        *(({"answer": text}, "target.text", text.strip()) for text in (" OCTOBER 17, 1995. ", "A. Smith")),
        (RAW, "target.text", RAW["answer"]),
        ({"answers": "raw", "answer": "B", "options": OPTIONS}, "target.text", "B"),
        ({}, "query.text", "How many?\nAnswer briefly."),
    ],
    page: [
        *(({"answer": text}, "target.images", (b"page",)) for text in (None, "", "[]")),
        *(({"source": source}, "query.text", "How many?") for source in ("docvqa", "Infographic-VQA")),
        ({"source": "pdf"}, "query.text", "How many?\nAnswer briefly."),
        ({"image": [{"bytes": b"1", "path": None}, {"bytes": b"2"}]}, "target.images", (b"1", b"2")),
        ({"query": "What else?", "image": {"bytes": b"re-encoded"}}, "target_id", "page:docvqa:a.pdf/page_9.jpg:9"),
        ({"source": "pdf", "image_filename": "b", "page": "1"}, "target_id", "page:pdf:b:1"),
        ({"image_filename": None}, "target_id", ""),
    ],
    visrag: [({"source": "Textbooks"}, "instruction", BENCHMARK), ({"prompts": "benchmark"}, "instruction", BENCHMARK)],
}


@pytest.mark.parametrize(
    ("source", "columns", "field", "expected"), [(source, *case) for source in BECOMES for case in BECOMES[source]]
)
def test_what_a_row_becomes(videos, source, columns, field, expected):
    found = attrgetter(field)(source(videos, **columns))
    assert (tuple(replace(item, instruction="") for item in found) if field == "negatives" else found) == expected


@pytest.mark.parametrize("text", [None, "", " ", "[]"])
def test_rows_without_an_answer_or_of_another_mode_are_not_used(text):
    assert answer(answer=text) is None
    assert copied(mode="caption_retrieval") is None


@pytest.mark.parametrize(
    "change", [{"video": "\ud800"}, {"conversations": turns(("human", HUMAN), ("gpt", "\ud800" * 200))}]
)
def test_a_lone_surrogate_costs_its_row_and_not_the_job(videos, tmp_path, change):
    row = {"video": "clip", "conversations": turns(("human", HUMAN), ("gpt", GPT))}
    (videos / "video_qa_240k.jsonl").write_text("".join(json.dumps(values) + "\n" for values in (row, row | change)))
    options = JobOptions(str(videos), str(tmp_path / "out"), verify="none", max_bad_share=1.0, workers=1)
    card = run_conversion(LlavaHound(modes=("qa",)), options)
    assert (card["records"], card["rejected"]["rows"]) == (1, 1)
    assert "lone surrogate" in card["rejected"]["causes"][0]["cause"]


@pytest.mark.parametrize("split", ["original", "diverse_instruction"])
@pytest.mark.parametrize("name", TASKS)
def test_instruction_and_text_are_the_string_of_the_row(split, name, roots):
    for values in pq.read_table(roots["mmeb"] / name / f"{split}-00000-of-00001.parquet").to_pylist():
        record = MmebTrain().convert(one_row(values, SOURCES[name], name))
        for column, *said in (
            ("qry", record.instruction, record.query.text),
            ("pos_text", record.target.instruction, record.target.text),
        ):
            assert " ".join(filter(None, said)) == values[column].replace(MARK, "").strip()
        if split == "diverse_instruction":  # an unknown wording is the instruction only of a query without text
            assert bool(record.query.text) == bool(not record.instruction) == TASKS[name].query_text


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


def test_eight_frames_are_those_of_the_reference():
    assert frame_indices(16, 8) == [0, 2, 4, 6, 8, 10, 12, 15]
    for total in range(9, 1000):
        assert frame_indices(total, 8) == np.linspace(0, total - 1, 8).astype(int).tolist()
    assert (frame_indices(3, 8), frame_indices(5, 1)) == ([0, 1, 2], [0])


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


def test_an_option_is_told_from_its_letter():
    options = {"D": ("D", ""), "(B)": ("B", ""), "A.": ("A", ""), "a": (None, "a"), "D or E": (None, "D or E")}
    options |= {"B. two bars": ("B", "two bars"), "(C) 3.5": ("C", "3.5"), "D: x": ("D", "x")}
    options |= {"-": (None, "-"), "A bar": (None, "A bar"), "42": (None, "42")}
    assert {option: split_option(option) for option in options} == options


def shards(converter, place):
    return [(shard.file, shard.source, shard.stop) for shard in converter.shards(InputRoot(place))]


def test_which_files_are_read_for_what(roots, tmp_path):
    file = "original-00000-of-00001.parquet"
    assert shards(MmebTrain(), roots["mmeb"]) == [(f"{name}/{file}", SOURCES[name], None) for name in TASKS]
    root = roots["mmeb"]  # a set is found in the folder of all, in its own, and alone
    for place, found in ((root, f"CIRR/{file}"), (root / "CIRR", file), (root / "CIRR" / file, file)):
        assert shards(MmebTrain(("CIRR",)), place) == [(found, "mmeb_cirr", None)]
    stops = [stop for _, _, stop in shards(LlavaHound(), roots["llava_hound"])]
    assert stops == [None, 240_000, None]
    for name in ("video_qa_240k.jsonl", "video_240k_caption_15k.jsonl"):  # a file of questions alone is read whole
        (tmp_path / name).write_text("{}\n")
    alone = [("video_qa_240k.jsonl", "llavahound_qa", None)]
    assert shards(LlavaHound(modes=("qa",)), tmp_path) == alone
    found = shards(LlavaHound(embed_rl=True), roots["embed_rl"])  # a copy that names its mode is read for it alone
    assert found == [(f"{source}.jsonl", source, None) for _, source, _ in found]
    assert len(shards(LlavaHound(embed_rl=True), tmp_path / alone[0][0])) == 3
    train = [f"data/train-0000{number}-of-00002.parquet" for number in (0, 1)]  # and not the split test
    assert shards(ColPaliTrain(), roots["colpali"]) == [(file, "vidore_colpali", None) for file in train]


def test_missing_files_and_wrong_options_are_refused(roots, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000-of-00001.parquet").touch()
    for converter, place, message in (
        (MmebTrain(), roots["mmeb"] / "CIRR/original-00000-of-00001.parquet", "--sets"),
        (MmebTrain(("CIRR", "NIGHTS"), split="train"), roots["mmeb"], "no CIRR/train"),
        (MmebTrain(), tmp_path, "no <set>/original"),
        *((LlavaHound(**options), tmp_path, "jsonl") for options in ({}, {"modes": ("qa",)}, {"embed_rl": True})),
        (VisRagTrain(), tmp_path, "train-"),
    ):
        with pytest.raises(DataError, match=message):
            converter.shards(InputRoot(place))
    for make, options in (
        (MmebTrain, {"sets": ("ImageNet-1K",)}),
        (MmebTrain, {"split": "test"}),
        *((LlavaHound, {"modes": modes}) for modes in (("caption",), ())),
        *((LlavaHound, options) for options in ({"frames": -1}, {"question_lines": 0})),
        *((ColPaliTrain, options) for options in ({"reading": "pages"}, {"answers": "x"})),
    ):
        with pytest.raises(ConfigError, match=r"one of|and modes some of"):
            make(**options)
