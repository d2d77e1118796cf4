# SPDX-License-Identifier: Apache-2.0
"""A reply counts if its form is strict and its evidence holds, as far as the level asks."""

from dataclasses import replace

import pytest
from PIL import Image

from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.annotate.replies import CUT_OFF, check_tcot, rule_of
from embedrl_verl.data.schema import Item, PairRecord, Video

TEXT = Item(text="A RED  bus at the stop", instruction="Find the bus")
ITEMS = {"text_keywords": TEXT, "bbox_2d": replace(TEXT, images=(b"a", b"b"))}
ITEMS["key_frames"] = Item(video=Video(path="a.mp4"))
PROMPT = Prompt([], original_sizes=((1000, 500), (40, 40)), seen_sizes=((560, 280), (56, 56)), num_frames=4)


def check(evidence, required="bbox_2d", level="usable", family="qwen2_vl", cut_off=False):
    text = f"<thinking>x {evidence} y</thinking><rethink>ok</rethink><answer>a</answer>"
    record = PairRecord("p", "s", "", ITEMS[required], TEXT, "")
    return check_tcot(Reply(text, cut_off), record, "query", PROMPT, family, level)


GOOD, TINY = "[0, 0, 500, 500]", "[0, 0, 5, 5]"
OUTSIDE, HALF = "[2000, 0, 3000, 500]", "[500, 500, 1200, 900]"


@pytest.mark.parametrize(
    ("boxes", "usable", "strict"),
    [
        (f"[{GOOD}]", True, True),
        ("[0, 0, 1000, 1000]", True, True),
        ("[0, 0, 1009, 1000]", True, True),  # rounding
        (f"[{GOOD}, {TINY}]", True, False),
        (f"[{TINY}]", False, False),
        (f"[{OUTSIDE}]", False, False),
        (f"[{HALF}]", True, False),
        ("[500, 500, 100, 100]", False, False),
        (f'[{{"image": 2, "box": {GOOD}}}]', True, True),
        (f'[{{"image": 3, "box": {GOOD}}}]', False, False),  # a matter of form
    ],
)
def test_boxes_must_lie_in_their_image_and_be_large_enough_to_cut(boxes, usable, strict):
    for level, expected in (("usable", usable), ("strict", strict)):
        problems, notes = check(f'{{"bbox_2d": {boxes}}}', level=level)
        assert (not problems) == expected, (level, problems)
        assert bool(notes) == (expected and usable and not strict)


def test_absolute_boxes_are_in_pixels_of_the_image_as_seen():
    assert check('{"bbox_2d": [0, 0, 560, 280]}', family="qwen2_5_vl", level="strict") == ([], [])
    (problem,), _ = check('{"bbox_2d": [0, 0, 900, 280]}', family="qwen2_5_vl", level="strict")
    assert problem == "a box must lie inside its image; got (0.0, 0.0, 900.0, 280.0)"


@pytest.mark.parametrize(
    ("words", "usable", "strict"),
    [
        ('["red bus", "STOP"]', True, True),  # white space and case aside
        ('["find the"]', True, True),  # the instruction is text, too
        ('["red", "blue"]', True, False),
        ('["blue", "green"]', False, False),
    ],
)
def test_keywords_must_occur_in_the_text(words, usable, strict):
    for level, expected in (("usable", usable), ("strict", strict)):
        problems, _ = check(f'{{"text_keywords": {words}}}', "text_keywords", level)
        assert (not problems) == expected
    assert check('{"text_keywords": ["blue"]}', "text_keywords", "off") == ([], [])


def test_key_frames_must_be_in_the_clip_at_every_level():
    assert check('{"key_frames": [1, 4]}', "key_frames", "strict") == ([], [])
    for level in ("off", "usable", "strict"):
        problems, _ = check('{"key_frames": [5]}', "key_frames", level)
        assert "must not be above the number of frames, 4; got 5" in problems[0]


def test_the_evidence_must_be_of_the_inputs_kind():
    problems, _ = check('{"text_keywords": ["red"]}', "bbox_2d", "off")
    assert problems == ["the JSON object must have the key bbox_2d with at least one valid entry"]


def test_a_reply_that_was_cut_off_is_refused_even_if_it_reads_well():
    problems, _ = check(f'{{"bbox_2d": {GOOD}}}', cut_off=True)
    assert problems == [CUT_OFF]


@pytest.mark.parametrize("text", ["", "<thinking>", "<answer>a</answer>", "[" * 5000, "\ud800"])
def test_rubbish_has_problems_and_raises_nothing(text):
    record = PairRecord("p", "s", "", ITEMS["bbox_2d"], TEXT, "")
    problems, notes = check_tcot(Reply(text), record, "query", PROMPT, "qwen2_vl", "strict")
    assert problems and not notes


def test_no_pixel_is_made_for_a_check(monkeypatch):
    """It is done in the event loop."""
    monkeypatch.setattr(Image, "new", None)
    assert check(f'{{"bbox_2d": {GOOD}}}', level="strict") == ([], [])
    assert check('{"key_frames": [1]}', "key_frames", "strict") == ([], [])


def test_problems_are_counted_by_rule():
    assert rule_of("a box must lie inside its image; got (1, 2) (and 3 more)") == "a box must lie inside its image"
    assert rule_of("<answer> must not be empty") == "<answer> must not be empty"
