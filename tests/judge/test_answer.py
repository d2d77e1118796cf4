# SPDX-License-Identifier: Apache-2.0
import re
import time

import pytest

from embedrl_verl.judge import parse_choice
from embedrl_verl.judge.answer import is_whole_choice

ONE = """3| 3 |3.|(3)|[3]|**3**|#3|Candidate 3|Answer: 3|answer:3|The answer is 3.|03|3 - the same number
I pick 3, and I mean 3|<candidate>3</candidate>|3, because it fits|\t3\t"""
NONE = """| |three|0|6|-3|3.5|1, 2|1,2|1 or 2|1-3|12|1 2|33|3 of 6|3 of 1999|none|³|３|3/4|1..2"""


@pytest.mark.parametrize("text", re.split(r"[|\n]", ONE))
def test_one_listed_number_is_a_choice(text):
    assert parse_choice(text, 5) == 3


@pytest.mark.parametrize("text", [*NONE.split("|"), "9" * 5000, "3" + "0" * 5000])
def test_anything_else_is_no_choice(text):
    assert parse_choice(text, 5) is None


def test_every_number_of_the_list_can_be_chosen():
    assert [parse_choice(str(number), 12) for number in range(14)] == [None, *range(1, 13), None]


def test_long_garbage_is_read_in_linear_time():
    start = time.perf_counter()
    for text in ("1," * 100_000, "-" * 200_000, "1.1" * 60_000, "answer " * 30_000):
        assert parse_choice(text, 5) in (None, 1)
    assert time.perf_counter() - start < 5


def test_a_text_that_was_cut_off_is_a_choice_only_if_no_longer_number_begins_with_it():
    assert is_whole_choice(" 3", 12) and is_whole_choice("12", 12) and is_whole_choice("1", 9)
    for text in ("1", "", "Candidate 3", "13", "3 z", "0"):
        assert not is_whole_choice(text, 12)
