# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import time

from embedrl_verl.report.text import MAX_TEXT, is_in_text, marked


def marks(text: str, keywords: list[str]) -> list[tuple[str, str]]:
    """(colour, marked text) of every mark."""
    return re.findall(r'<mark class="(c\d)"[^>]*>(.*?)</mark>', marked(text, keywords), re.DOTALL)


def test_keywords_are_found_without_regard_to_case_and_white_space() -> None:
    assert marks("A Red\n bus and a red bus", ["red bus", "a"]) == [
        ("c1", "A"),
        ("c0", "Red\n bus"),
        ("c1", "a"),
        ("c1", "a"),
        ("c0", "red bus"),
    ]
    assert is_in_text("red  BUS", "the Red bus") and not is_in_text("redbus", "red bus") and not is_in_text(" ", "a b")


def test_of_overlapping_keywords_the_longer_is_marked() -> None:
    assert marks("the red double-decker bus", ["bus", "red", "red double-decker bus"]) == [
        ("c2", "red double-decker bus")
    ]
    assert marks("abcab", ["ab", "bca"]) == [("c1", "bca")]


def test_signs_of_regular_expressions_are_letters() -> None:
    assert marks("costs 1.5$ (net)", ["1.5$ (net)", ".*"]) == [("c0", "1.5$ (net)")]


def test_a_long_text_is_cut_and_says_so() -> None:
    html = marked("x" * (MAX_TEXT + 1234), [])
    assert html.count("x") == MAX_TEXT and "1,234 more characters" in html


def test_many_keywords_in_a_long_text_take_no_time() -> None:
    start = time.process_time()
    marked("a " * MAX_TEXT, ["a a a a b"] * 1000 + [" ".join("a" * n) for n in range(1, 60)])
    assert time.process_time() - start < 5
