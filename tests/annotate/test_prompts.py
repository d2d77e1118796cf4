# SPDX-License-Identifier: Apache-2.0
"""What is asked is what RL asks: the same words and the same pixels; and a second question says what was wrong."""

import itertools

import numpy as np
import pytest

from embedrl_verl.annotate.backends import parts_of
from embedrl_verl.annotate.prompts import TcotPrompts, again, gold_answer_of
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Video
from embedrl_verl.families import token_side
from tests.annotate.fakes import PROMPTS, pairs, picture

KINDS = ("text", "image", "video")


SIZES = [(640, 300), (31, 90), (1200, 900)]
PAGE = Item(text="t", images=tuple(picture(i, size) for i, size in enumerate(SIZES)), kind="page")
CLIP = Item(video=Video(frames=tuple(picture(i, SIZES[0]) for i in range(11)), fps=2.0))
TEXT = Item(text="a <|im_end|> b")
RECORDS = [PairRecord("1", "s", "do", PAGE, CLIP, ""), PairRecord("2", "s", "do", CLIP, TEXT, "")]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("style", ["paper", "compact"])
def test_words_and_pixels_are_those_of_the_rollout(family, style):
    limits = MediaLimits(token_side(family), 4, 64, 4, 16, max_frames=7)
    prompts = TcotPrompts(family, style, True, limits)
    compared = 0
    for record, side in itertools.product(RECORDS, SIDES):
        ours = prompts.prompt(record, side)
        theirs = prompt_messages(record, side, family=family, style=style, few_shot=True, max_frames=7)
        parts = {kind: [one for one in parts_of(ours.messages) if one["type"] == kind] for kind in KINDS}
        texts = [part["text"] for part in parts_of(theirs) if part["type"] == "text"]
        assert [part["text"] for part in parts["text"]] == texts
        images, videos = load_prompt_media(theirs, limits, None)
        for mine, image in zip(parts["image"], images or [], strict=True):
            assert (np.asarray(mine["image"]) == np.asarray(image)).all()
            compared += 1
        for clip, (video, metadata) in zip(parts["video"], videos or [], strict=True):
            mine = np.stack([np.asarray(frame) for frame in clip["video"]]).transpose(0, 3, 1, 2)
            assert (mine == video.numpy()).all() and clip["times"].metadata() == metadata and len(mine) == 8
            compared += 1
    assert compared == 5


def test_only_a_query_whose_target_has_text_has_an_answer_to_tell():
    text, image, video = pairs(3)
    assert [gold_answer_of(record, "query") for record in (text, image, video)] == ["red 0", "red 1", None]
    assert gold_answer_of(text, "target") is None
    told, untold = (PROMPTS.prompt(text, "query", gold).messages[0]["content"][-1]["text"] for gold in ("4711", None))
    assert "4711" in told and "4711" not in untold


def test_asking_again_keeps_the_question_and_says_every_problem():
    first = PROMPTS.prompt(RECORDS[0], "query")
    problems = ["a box must have four finite numbers; got [1]", "no <|im_start|>"]
    second = again(first, "<|im_end|> rubbish " * 1000, problems)
    assert second.messages[:-2] == first.messages and second.seen_sizes == first.seen_sizes
    reply, complaint = second.messages[-2:]
    assert reply["role"] == "assistant" and "<|im_end|>" not in reply["content"] and len(reply["content"]) < 4100
    assert "- a box must have four finite numbers; got [1]\n" in complaint["content"]
    assert complaint["role"] == "user" and "<|im_start|>" not in complaint["content"]
    assert again(first, " ", ["x"]).messages[-2]["content"] == "(no text)"
