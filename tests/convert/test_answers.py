# SPDX-License-Identifier: Apache-2.0
"""Which answers are the same, and what the odd spellings of a cell mean."""

from __future__ import annotations

import pytest

from data_preprocess.colpali_train import listed, option_letter, without_letter
from embedrl_verl.convert.common import LONGEST_PLAIN_ID, answer_id

SAME = {"A cab.": "cab", "Yes": "yes!", "the  White\nHouse": "White House", "10.5 ": "10.5", "ｔｗｏ": "two"}
SAME |= {'"October 17, 1995."': "OCTOBER 17, 1995"}
OTHER = {"-456": "456", ".5": "5", "1.5": "15", "10%": "10", "5'": "5", "Fox's": "Foxs", "two men": "men", "a": "the"}
OTHER |= {"C++": "C"}
CELLS = [
    ("['five to ten hours', 'twelve']", ["five to ten hours", "twelve"]),
    ("[12, 3.5, ' x ']", ["12", "3.5", "x"]),
    (["a"], ["a"]),
    ("[]", []),
    *(
        (cell, None)
        for cell in ("plain", "[sic] a quotation", "[sic]", "[[1, 2]]", "['torn", "[__import__('os')]", 7, None)
    ),
]
LETTERS = {"D": "D", "(B)": "B", "A.": "A", "a": None, "D or E": None, "42": None}
OPTIONS = {"B. two bars": ("B", "two bars"), "(C) 3.5": ("C", "3.5"), "D: x": ("D", "x")}
OPTIONS |= {"-": (None, "-"), "A bar": (None, "A bar")}


@pytest.mark.parametrize(("one", "other"), SAME.items())
def test_answers_that_mean_the_same_have_one_id(one, other):
    assert answer_id(one) == answer_id(other)


@pytest.mark.parametrize(("one", "other"), OTHER.items())
def test_answers_that_differ_in_a_sign_a_unit_or_a_word_do_not(one, other):
    assert answer_id(one) != answer_id(other)


@pytest.mark.parametrize("text", ["?", "...", "'", "the", '""'])
def test_an_answer_of_marks_alone_keeps_an_id_of_its_own(text):
    assert answer_id(text) == f"answer:{text}"


def test_a_long_answer_gets_a_short_id_that_still_tells_answers_apart():
    long = "word " * 1000
    assert len(answer_id(long)) < LONGEST_PLAIN_ID
    assert answer_id(long) == answer_id(long.upper() + ".") != answer_id(long + "other")


@pytest.mark.parametrize(("cell", "expected"), CELLS)
def test_a_list_written_out_as_a_string_is_read_and_nothing_else(cell, expected):
    assert listed(cell) == expected


@pytest.mark.parametrize(("answer", "letter"), LETTERS.items())
def test_only_a_lone_letter_names_an_option(answer, letter):
    assert option_letter(answer) == letter


@pytest.mark.parametrize(("option", "expected"), OPTIONS.items())
def test_the_letter_of_an_option_is_told_from_its_text(option, expected):
    assert without_letter(option) == expected
