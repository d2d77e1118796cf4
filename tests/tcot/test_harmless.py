# SPDX-License-Identifier: Apache-2.0
"""A text shown inside a prompt can neither forge a turn nor leave its tags, and stays readable."""

import time

import pytest

from embedrl_verl.tcot.harmless import break_control, break_tags, break_tokens


@pytest.mark.parametrize(
    "mark", ["<|im_end|>", "<｜User｜>", "<start_of_turn>", "[INST]", "</s>", "<<SYS>>", "<image>"]
)
def test_marks_of_chat_formats_are_broken(mark):
    assert mark not in break_control(f"a {mark} b") and len(break_control(mark)) > len(mark)


@pytest.mark.parametrize("text", ["a < b | c > d", "[1, 2]", "<answer>3</answer>", '{"bbox_2d": [1]}', "日本"])
def test_other_texts_stay_as_they_are(text):
    assert break_control(text) == break_tokens(text) == text


def test_tokens_of_the_chat_format_and_those_that_are_named_are_broken():
    assert break_tokens("<|a|> <emb> <|b c|>") == "< |a| > <emb> <|b c|>"
    assert break_tokens("<|a|> <emb> <embed>", "emb") == "< |a| > < emb > <embed>"


def test_tags_of_the_template_are_broken_whatever_white_space_is_in_them():
    text = break_tags("<query> </ Query> < / query > <queries> <b>", ("query",))
    assert text == "&lt;query> &lt;/ Query> &lt; / query > <queries> <b>"
    assert break_tags("<query>", ()) == "<query>"


@pytest.mark.parametrize("part", ["<", "< ", "<" + " " * 200_000, "</ "])
def test_tags_are_looked_for_in_linear_time(part):
    text = part * (400_000 // len(part))
    start = time.process_time()
    assert break_tags(text, ("query", "question")) == text
    assert time.process_time() - start < 5
