# SPDX-License-Identifier: Apache-2.0
"""A text shown inside a prompt can neither forge a turn nor leave its tags, and stays readable."""

import pytest

from embedrl_verl.tcot.harmless import break_control, break_tags


@pytest.mark.parametrize(
    "mark", ["<|im_end|>", "<｜User｜>", "<start_of_turn>", "[INST]", "</s>", "<<SYS>>", "<image>"]
)
def test_marks_of_chat_formats_are_broken(mark):
    assert mark not in break_control(f"a {mark} b") and len(break_control(mark)) > len(mark)


def test_tags_of_the_template_are_broken_whatever_white_space_is_in_them():
    text = break_tags("<query> </ Query> < / query > <queries> <b>", ("query",))
    assert text == "&lt;query> &lt;/ Query> &lt; / query > <queries> <b>"
    assert break_tags("<query>", ()) == "<query>"


@pytest.mark.parametrize("text", ["a < b | c > d", "[1, 2]", "<answer>3</answer>", '{"bbox_2d": [1]}', "日本"])
def test_other_texts_stay_as_they_are(text):
    assert break_control(text) == text
