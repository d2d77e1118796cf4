# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Hound: the three modes and their roles, which lines are questions, frames, and rows that must be refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_preprocess.llava_hound import LlavaHound, frame_indices
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.data.schema import Video
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, records_of

HUMAN, GPT = "<video>\nWhat is shown?", "A number."


@pytest.fixture
def videos(tmp_path):
    """A media root with `train_300k/clip` of one frame, `empty` without frames, and a clip outside."""
    folder = tmp_path / "root/train_300k"
    for place in (folder / "clip", folder / "empty", tmp_path / "outside"):
        place.mkdir(parents=True)
    for file in (folder / "clip/c01_0001.jpeg", folder / "clip/notes.txt", tmp_path / "outside/c01_0001.jpeg"):
        file.touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


def turns(*said):
    return [{"from": speaker, "value": value} for speaker, value in said]


BOTH = turns(("human", HUMAN), ("gpt", GPT))


def convert(videos, mode="caption_retrieval", **columns):
    values = {"id": "clip", "video": "clip", "conversations": BOTH} | columns
    return LlavaHound().convert(one_row(values, f"llavahound_{mode}", mode, videos))


def test_which_lines_are_read_for_which_mode(roots, tmp_path):
    stops = {shard.note: shard.stop for shard in LlavaHound().shards(InputRoot(roots["llava_hound"]))}
    assert stops == {"caption_retrieval": None, "qa": 240_000, "video_retrieval": None}
    for name in ("video_qa_240k.jsonl", "video_240k_caption_15k.jsonl"):  # a file of questions alone is read whole
        (tmp_path / name).write_text("{}\n")
    (shard,) = LlavaHound(modes=("qa",)).shards(InputRoot(tmp_path))
    assert (shard.file, shard.stop) == ("video_qa_240k.jsonl", None)
    copies = LlavaHound(embed_rl=True)  # a copied file that names its mode is read for it alone
    shards = copies.shards(InputRoot(roots["embed_rl"]))
    assert [(shard.source, shard.file) for shard in shards] == [(s.source, f"{s.source}.jsonl") for s in shards]
    assert len(copies.shards(InputRoot(tmp_path / "video_qa_240k.jsonl"))) == 3


def test_eight_frames_are_those_of_the_reference():
    assert frame_indices(16, 8) == [0, 2, 4, 6, 8, 10, 12, 15]
    for total in range(9, 1000):
        assert frame_indices(total, 8) == np.linspace(0, total - 1, 8).astype(int).tolist()
    assert (frame_indices(3, 8), frame_indices(5, 1)) == ([0, 1, 2], [0])


@pytest.mark.parametrize(("options", "kept"), [({}, (1, 3, 5, 7, 9, 11, 13, 16)), ({"frames": 0}, range(1, 17))])
def test_frames_are_in_natural_order_and_all_of_them_on_request(roots, options, kept):
    record = records_of(LlavaHound(("caption_retrieval",), **options), roots["llava_hound"])[1]
    folder = f"train_300k/{record.target_id.removeprefix('video:')}"
    assert record.query.video.frames == tuple(f"{folder}/c01_{number}.jpeg" for number in kept)


def test_a_clip_of_one_frame_and_a_video_file_are_videos(videos):
    assert convert(videos).query.video == Video(frames=("train_300k/clip/c01_0001.jpeg",))
    (videos / "train_300k/film.mp4").touch()
    for name in ("film", "film.mp4"):
        assert convert(videos, video=name).query.video == Video(path="train_300k/film.mp4")
    assert convert(videos, video=["clip"]) == convert(videos)


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        *(({"video": name}, "video") for name in ("images/blank.jpg", "", None, ["a", "b"], "missing", "empty")),
        *(({"video": name}, "video") for name in ("../../outside", "clip\0", "link")),
        *(({"conversations": value}, "conversations") for value in ([], "a", turns(("human", HUMAN)))),
        ({"conversations": ["a"]}, "conversations[0]"),
        ({"conversations": turns(("human", "<video>\n"), ("gpt", GPT))}, "conversations"),
        ({"conversations": turns(("human", HUMAN), ("gpt", None))}, "conversations[1].value"),
        ({"conversations": [{"value": "a"}]}, "conversations[0].from"),
    ],
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(videos, columns, field):
    with pytest.raises(RowError) as caught:
        convert(videos, **columns)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "change", [{"video": "\ud800"}, {"conversations": turns(("human", HUMAN), ("gpt", "\ud800" * 200))}]
)
def test_a_lone_surrogate_costs_its_row_and_not_the_job(videos, tmp_path, change):
    row = {"video": "clip", "conversations": BOTH}
    lines = [json.dumps(values) + "\n" for values in (row, row | change)]
    (videos / "video_qa_240k.jsonl").write_text("".join(lines))
    options = JobOptions(str(videos), str(tmp_path / "out"), verify="none", max_bad_share=1.0, workers=1)
    card = run_conversion(LlavaHound(modes=("qa",)), options)
    assert (card["records"], card["rejected"]["rows"]) == (1, 1)
    assert "lone surrogate" in card["rejected"]["causes"][0]["cause"]


def test_who_speaks_is_told_by_the_role_and_not_by_the_place(videos):
    turned = convert(videos, conversations=turns(("gpt", GPT), ("human", HUMAN), ("gpt", "later")))
    assert turned == convert(videos)


def test_captions_and_videos_have_the_id_of_the_video_and_answers_of_their_words(videos):
    other = convert(videos, conversations=turns(("human", HUMAN), ("gpt", "Another caption.")))
    ids = {record.target_id for record in (convert(videos), convert(videos, "video_retrieval"), other)}
    assert ids == {"video:clip"}
    assert convert(videos, "qa").target_id == "answer:number"


def copied(mode="qa", **change):
    says, blank = turns(("gpt", GPT)), ["images/blank.jpg"]
    asks = {"conversations": turns(("human", HUMAN)), "video": ["v/1.jpeg"]}
    row = {"dataset_name": f"llavahound_{mode}", "qry": asks, "pos": {"conversations": says, "video": blank}}
    return LlavaHound(embed_rl=True).convert(one_row(row | change, "llavahound_qa", "qa"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dataset_name": "MSCOCO"}, "dataset_name"),
        ({"qry": None}, "qry"),
        ({"qry": {"conversations": turns(("human", HUMAN)), "video": ["images/blank.jpg"]}}, "qry.video"),
        ({"qry": {"conversations": turns(("human", HUMAN)), "video": "images/blank.jpg"}}, "qry.video"),
        ({"qry": {"conversations": turns(("gpt", GPT)), "video": ["v/1.jpeg"]}}, "qry.conversations"),
        ({"pos": {"conversations": turns(("human", HUMAN)), "video": []}}, "pos.conversations"),
        ({"pos": {"conversations": turns(("gpt", GPT)), "video": ["v/2.jpeg"]}}, "video"),
    ],
)
def test_a_bad_copied_row_is_refused_by_the_name_of_its_field_and_one_of_another_mode_not_used(change, field):
    assert copied("caption_retrieval") is None
    assert copied()
    with pytest.raises(RowError) as caught:
        copied(**change)
    assert caught.value.field == field


def test_missing_files_and_wrong_options_are_refused(tmp_path):
    for options in ({}, {"modes": ("qa",)}, {"embed_rl": True}):
        with pytest.raises(DataError, match="jsonl"):
            LlavaHound(**options).shards(InputRoot(tmp_path))
    for options in ({"modes": ("caption",)}, {"modes": ()}, {"frames": -1}, {"question_lines": 0}):
        with pytest.raises(ConfigError):
            LlavaHound(**options)
