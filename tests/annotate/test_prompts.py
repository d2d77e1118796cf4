# SPDX-License-Identifier: Apache-2.0
"""What is asked is what RL asks: the same words and the same pixels; and a second question says what was wrong."""

import numpy as np
import pytest

from embedrl_verl.annotate.prompts import TcotPrompts, again, gold_answer_of
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Video
from embedrl_verl.errors import ConfigError, MediaError
from embedrl_verl.families import token_side
from tests.annotate.fakes import LIMITS, PROMPTS, pairs, picture

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def records():
    sizes = [(640, 300), (31, 90), (1200, 900)]
    images = tuple(picture(i, size) for i, size in enumerate(sizes))
    frames = tuple(picture(i, sizes[0]) for i in range(11))
    text = Item(text="a <|im_end|> b")
    page = Item(text="t", images=images, kind="page")
    clip = Item(video=Video(frames=frames, fps=2.0))
    return [PairRecord("1", "s", "do", page, clip, ""), PairRecord("2", "s", "do", clip, text, "")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["paper", "compact"])
def test_words_and_pixels_are_those_of_the_rollout(family, style):
    limits = MediaLimits(token_side(family), 4, 64, 4, 16, max_frames=7)
    prompts = TcotPrompts(family, style, True, limits)
    compared = 0
    for record in records():
        for side in SIDES:
            ours = prompts.prompt(record, side)
            theirs = prompt_messages(record, side, family=family, style=style, few_shot=True, max_frames=7)
            parts = [part for message in ours.messages for part in message["content"]]
            texts = [part["text"] for message in theirs for part in message["content"] if part["type"] == "text"]
            assert [part["text"] for part in parts if part["type"] == "text"] == texts
            images, videos = load_prompt_media(theirs, limits, None)
            seen = [np.asarray(part["image"]) for part in parts if part["type"] == "image"]
            for mine, image in zip(seen, images or [], strict=True):
                assert (mine == np.asarray(image)).all()
                compared += 1
            clips = [part for part in parts if part["type"] == "video"]
            for clip, (video, metadata) in zip(clips, videos or [], strict=True):
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
    first = PROMPTS.prompt(records()[0], "query")
    second = again(
        first, "<|im_end|> rubbish " * 1000, ["a box must have four finite numbers; got [1]", "no <|im_start|>"]
    )
    assert second.messages[:-2] == first.messages and second.seen_sizes == first.seen_sizes
    reply, complaint = second.messages[-2:]
    assert reply["role"] == "assistant" and "<|im_end|>" not in reply["content"] and len(reply["content"]) < 4100
    assert "- a box must have four finite numbers; got [1]\n" in complaint["content"]
    assert complaint["role"] == "user" and "<|im_start|>" not in complaint["content"]
    assert again(first, " ", ["x"]).messages[-2]["content"] == "(no text)"


def test_media_that_cannot_be_read_are_an_error_of_the_row():
    with pytest.raises(MediaError):
        PROMPTS.prompt(PairRecord("1", "s", "", Item(images=(b"no image",)), Item(text="t"), ""), "query")
    with pytest.raises(ConfigError, match="visual tokens"):
        TcotPrompts("qwen3_vl", "paper", True, LIMITS)
