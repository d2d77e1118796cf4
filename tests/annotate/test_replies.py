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
GOOD, TINY, OUTSIDE = "[0, 0, 500, 500]", "[0, 0, 5, 5]", "[2000, 0, 3000, 500]"
ALL, ONE, FORM, NONE = ("off", "usable", "strict"), ("off", "usable"), ("off",), ()


def check(key, evidence, level, family="qwen2_vl", needs=None, cut_off=False):
    text = f'<thinking>x {{"{key}": {evidence}}} y</thinking><rethink>ok</rethink><answer>a</answer>'
    record = PairRecord("p", "s", "", ITEMS[needs or key], TEXT, "")
    return check_tcot(Reply(text, cut_off), record, "query", PROMPT, family, level)


@pytest.mark.parametrize(
    ("key", "evidence", "accepted"),
    [
        ("bbox_2d", f"[{GOOD}]", ALL),
        ("bbox_2d", "[0, 0, 1009, 1000]", ALL),  # rounding
        ("bbox_2d", f"[{GOOD}, {TINY}]", ONE),
        ("bbox_2d", f"[{TINY}]", FORM),
        ("bbox_2d", f"[{OUTSIDE}]", FORM),
        ("bbox_2d", "[500, 500, 1200, 900]", ONE),  # a part of it can be cut
        ("bbox_2d", "[500, 500, 100, 100]", FORM),
        ("bbox_2d", f'[{{"image": 2, "box": {GOOD}}}]', ALL),
        ("bbox_2d", f'[{{"image": 3, "box": {GOOD}}}]', NONE),
        ("text_keywords", '["red bus", "STOP"]', ALL),  # white space and case aside
        ("text_keywords", '["find the"]', ALL),  # the instruction is text, too
        ("text_keywords", '["red", "blue"]', ONE),
        ("text_keywords", '["blue", "green"]', FORM),
        ("key_frames", "[1, 4]", ALL),
        ("key_frames", "[5]", NONE),
    ],
)
def test_evidence_must_hold_as_far_as_the_level_asks(key, evidence, accepted, monkeypatch):
    monkeypatch.setattr(Image, "new", None)  # it is done in the event loop: no pixel is made for it
    assert tuple(level for level in ALL if not check(key, evidence, level)) == accepted


def test_absolute_boxes_are_in_pixels_of_the_image_as_seen():
    assert check("bbox_2d", "[0, 0, 560, 280]", "strict", family="qwen2_5_vl") == []
    (problem,) = check("bbox_2d", "[[0, 0, 900, 280], [0, 0, 800, 280]]", "strict", family="qwen2_5_vl")
    assert problem == "a box must lie inside its image; got (0.0, 0.0, 900.0, 280.0) (and 1 more)"
    assert rule_of(problem) == "a box must lie inside its image"


def test_evidence_of_another_kind_and_a_cut_off_reply_are_refused():
    missing = "the JSON object must have the key bbox_2d with at least one valid entry"
    assert check("text_keywords", '["red"]', "off", needs="bbox_2d") == [missing]
    assert check("bbox_2d", GOOD, "off", cut_off=True) == [CUT_OFF]


@pytest.mark.parametrize("text", ["", "<thinking>", "<answer>a</answer>", "[" * 5000, "\ud800"])
def test_rubbish_has_problems_and_raises_nothing(text):
    record = PairRecord("p", "s", "", ITEMS["bbox_2d"], TEXT, "")
    assert check_tcot(Reply(text), record, "query", PROMPT, "qwen2_vl", "strict")
