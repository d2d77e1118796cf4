# SPDX-License-Identifier: Apache-2.0
"""A text shown inside a prompt can neither forge a turn nor leave its tags, and stays readable."""

import re
import sys
import time
import unicodedata

import pytest

from embedrl_verl.tcot.harmless import _invisible, break_control, break_tags


@pytest.mark.parametrize(
    "mark", ["<|im_end|>", "<｜User｜>", "<start_of_turn>", "[INST]", "</s>", "<<SYS>>", "<image>"]
)
def test_marks_of_chat_formats_are_broken(mark):
    assert mark not in break_control(f"a {mark} b") and len(break_control(mark)) > len(mark)


def test_tags_of_the_template_are_broken_whatever_white_space_is_in_them():
    text = break_tags("<query> </ Query> < / query > <queries> <b>", ("query",))
    assert text == "&lt;query> &lt;/ Query> &lt; / query > <queries> <b>"
    assert break_tags("<query>", ()) == "<query>"


@pytest.mark.parametrize(
    "tag",
    [
        "<\u200b/query>",
        "＜/query＞",
        "<／query>",
        "</\u00adquery>",
        "</qu\u2060ery>",
        "＜\ufeff ／ \u200dQu\u200bery\u200b＞",
    ],
)
def test_look_alikes_of_the_templates_tags_are_broken_and_nothing_else_of_them_changes(tag):
    assert break_tags(f"a {tag} b", ("query",)) == f"a &lt;{tag[1:]} b"


@pytest.mark.parametrize("text", ["＜b＞ \u200b 1／2", "<queries>", "<\u200bb>", "می\u200cخواهم < query2"])
def test_invisible_and_fullwidth_characters_elsewhere_stay(text):
    assert break_tags(text, ("query",)) == text


@pytest.mark.parametrize(
    "part", ["<", "< ", "<\u200b", "<" + " " * 200_000, "<q" + "\u200b" * 200_000, "</ \u200b" * 9]
)
def test_tags_are_looked_for_in_linear_time(part):
    text = part * (400_000 // len(part))
    break_tags("", ("query",))  # compiles
    start = time.process_time()
    assert break_tags(text, ("query", "question")) == text
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["a < b | c > d", "[1, 2]", "<answer>3</answer>", '{"bbox_2d": [1]}', "日本"])
def test_other_texts_stay_as_they_are(text):
    assert break_control(text) == text


def test_no_format_character_of_unicode_is_left_out():
    hidden = re.compile(f"[{_invisible()}]")
    wrong = [
        c for c in map(chr, range(sys.maxunicode + 1)) if (unicodedata.category(c) == "Cf") != bool(hidden.match(c))
    ]
    assert wrong == []
