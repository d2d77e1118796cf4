# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Hound: the three modes and their roles, which lines are questions, frames, and rows that must be refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_preprocess.llava_hound import LlavaHound, frame_indices
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.schema import Video
from embedrl_verl.errors import ConfigError, DataError
from tests.convert.golden import one_row, records_of
from tests.convert.make_fixtures import Pen, write_embed_rl, write_llava_hound

PAIRS = 5
HUMAN, GPT = "<video>\nWhat is shown?", "A number."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hound")
    write_llava_hound(folder, pairs=PAIRS, pen=Pen())
    return folder


@pytest.fixture(scope="module")
def embed_rl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed_rl")
    write_embed_rl(folder, pairs=2, pen=Pen())
    return folder


@pytest.fixture
def videos(tmp_path):
    """A media root with `train_300k/clip` of one frame, `empty` without frames, and a clip outside."""
    for name in ("clip", "empty"):
        (tmp_path / "root/train_300k" / name).mkdir(parents=True)
    (tmp_path / "root/train_300k/clip/c01_0001.jpeg").touch()
    (tmp_path / "root/train_300k/clip/notes.txt").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/c01_0001.jpeg").touch()
    (tmp_path / "root/train_300k/link").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


def turns(*said):
    return [{"from": speaker, "value": value} for speaker, value in said]


def convert(videos, mode="caption_retrieval", **columns):
    values = {"id": "clip", "video": "clip", "conversations": turns(("human", HUMAN), ("gpt", GPT))} | columns
    return LlavaHound().convert(one_row(values, f"llavahound_{mode}", mode, media_root=videos))


def test_240_000_lines_are_questions_by_default(root):
    stops = {shard.note: shard.stop for shard in LlavaHound().shards(InputRoot(root))}
    assert stops == {"caption_retrieval": None, "qa": 240_000, "video_retrieval": None}


def test_a_file_of_questions_alone_is_read_whole(root, tmp_path):
    (tmp_path / "video_qa_240k.jsonl").write_text("{}\n")
    (tmp_path / "video_240k_caption_15k.jsonl").write_text("{}\n")
    (shard,) = LlavaHound(modes=("qa",)).shards(InputRoot(tmp_path))
    assert (shard.file, shard.stop) == ("video_qa_240k.jsonl", None)


@pytest.mark.parametrize(
    ("total", "indices"),
    [
        (16, [0, 2, 4, 6, 8, 10, 12, 15]),
        (30, [0, 4, 8, 12, 16, 20, 24, 29]),
        (10, [0, 1, 2, 3, 5, 6, 7, 9]),
        (3, [0, 1, 2]),
    ],
)
def test_eight_frames_are_those_of_the_reference(total, indices):
    assert frame_indices(total, 8) == indices


def test_frame_indices_are_numpys_for_every_length():
    for total in range(9, 1000):
        assert frame_indices(total, 8) == np.linspace(0, total - 1, 8).astype(int).tolist()
    assert frame_indices(5, 1) == [0]


def test_frames_are_in_natural_order_and_all_of_them_on_request(root):
    names = [
        json.loads(line)["video"] for line in (root / "video_instruction/train/sft/video_caption_300k.jsonl").open()
    ]
    folder = f"train_300k/{names[1]}"

    def frames(**options):
        records = list(records_of(LlavaHound(("caption_retrieval",), **options), root))
        return records[1].query.video.frames

    assert frames() == tuple(f"{folder}/c01_{number}.jpeg" for number in (1, 3, 5, 7, 9, 11, 13, 16))
    assert frames(frames=0) == tuple(f"{folder}/c01_{number}.jpeg" for number in range(1, 17))


def test_a_clip_of_one_frame_and_a_video_file_are_videos(videos):
    assert convert(videos).query.video == Video(frames=("train_300k/clip/c01_0001.jpeg",))
    (videos / "train_300k/film.mp4").touch()
    assert convert(videos, video="film").query.video == Video(path="train_300k/film.mp4")
    assert convert(videos, video="film.mp4").query.video == Video(path="train_300k/film.mp4")
    assert convert(videos, video=["clip"]) == convert(videos)


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"video": "images/blank.jpg"}, "video"),
        ({"video": ""}, "video"),
        ({"video": None}, "video"),
        ({"video": ["a", "b"]}, "video"),
        ({"video": "missing"}, "video"),
        ({"video": "empty"}, "video"),
        ({"video": "../../outside"}, "video"),
        ({"video": "link"}, "video"),
        ({"conversations": []}, "conversations"),
        ({"conversations": "a"}, "conversations"),
        ({"conversations": ["a"]}, "conversations[0]"),
        ({"conversations": turns(("human", HUMAN))}, "conversations"),
        ({"conversations": turns(("human", "<video>\n"), ("gpt", GPT))}, "conversations"),
        ({"conversations": turns(("human", HUMAN), ("gpt", None))}, "conversations[1].value"),
        ({"conversations": [{"value": "a"}]}, "conversations[0].from"),
    ],
)
def test_a_bad_row_is_refused_by_the_name_of_its_field(videos, columns, field):
    with pytest.raises(RowError) as caught:
        convert(videos, **columns)
    assert caught.value.field == field


def test_who_speaks_is_told_by_the_role_and_not_by_the_place(videos):
    turned = convert(videos, conversations=turns(("gpt", GPT), ("human", HUMAN), ("gpt", "later")))
    assert turned == convert(videos)


def test_captions_and_videos_have_the_id_of_the_video_and_answers_of_their_words(videos):
    caption, search = convert(videos), convert(videos, mode="video_retrieval")
    other = convert(videos, conversations=turns(("human", HUMAN), ("gpt", "Another caption.")))
    assert caption.target_id == search.target_id == other.target_id == "video:clip"
    assert convert(videos, mode="qa").target_id == "answer:number"


def copied(mode="qa", **change):
    row = {
        "dataset_name": f"llavahound_{mode}",
        "qry": {"conversations": turns(("human", HUMAN)), "video": ["v/1.jpeg"]},
        "pos": {"conversations": turns(("gpt", GPT)), "video": ["images/blank.jpg"]},
    }
    return one_row(row | change, "llavahound_qa", "qa")


def test_a_copied_row_of_another_mode_is_not_used():
    assert LlavaHound(embed_rl=True).convert(copied("caption_retrieval")) is None
    assert LlavaHound(embed_rl=True).convert(copied())


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
def test_a_bad_copied_row_is_refused_by_the_name_of_its_field(change, field):
    with pytest.raises(RowError) as caught:
        LlavaHound(embed_rl=True).convert(copied(**change))
    assert caught.value.field == field


def test_a_copied_file_that_names_its_mode_is_read_for_it_alone(embed_rl, tmp_path):
    shards = LlavaHound(embed_rl=True).shards(InputRoot(embed_rl))
    assert [(shard.source, shard.file) for shard in shards] == [(s.source, f"{s.source}.jsonl") for s in shards]
    (tmp_path / "mixed.jsonl").write_text("{}\n")
    assert len(LlavaHound(embed_rl=True).shards(InputRoot(tmp_path))) == 3


def test_missing_files_and_wrong_options_are_refused(tmp_path):
    for options in ({}, {"modes": ("qa",)}, {"embed_rl": True}):
        with pytest.raises(DataError, match="jsonl"):
            LlavaHound(**options).shards(InputRoot(tmp_path))
    for options in ({"modes": ("caption",)}, {"modes": ()}, {"frames": -1}, {"question_lines": 0}):
        with pytest.raises(ConfigError):
            LlavaHound(**options)
