# SPDX-License-Identifier: Apache-2.0
"""Texts of a card: keywords marked where they stand, a T-CoT in its parts, and long texts cut with a word about it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from embedrl_verl.report.html import Html, join, tag
from embedrl_verl.tcot import TCoT
from embedrl_verl.tcot.json_objects import find_objects

COLOURS = 8
"""Colours of the page's style: classes c0 ... c7."""
MAX_TEXT = 8_000
"""Characters of one text that are shown."""
MAX_KEYWORDS = 64
_TAG = re.compile(r"</?(?:thinking|rethink|answer)>")


def colour_class(number: int) -> str:
    """Class of a colour, numbered from 0; they repeat."""
    return f"c{number % COLOURS}"


def is_in_text(keyword: str, text: str) -> bool:
    """Whether the keyword stands in the text, letter case and white space aside."""
    pattern = _pattern(keyword)
    return pattern is not None and pattern.search(text) is not None


def marked(text: str, keywords: Sequence[str]) -> Html:
    """The text with its keywords marked in their colours; of overlapping ones the longer is marked."""
    shown, rest = text[:MAX_TEXT], len(text) - MAX_TEXT
    parts: list[str | None] = []
    end = 0
    for start, stop, number in _places(shown, keywords[:MAX_KEYWORDS]):
        parts.append(shown[end:start])
        parts.append(tag("mark", shown[start:stop], class_=colour_class(number), title=f"keyword {number + 1}"))
        end = stop
    parts.append(shown[end:])
    return join([*parts, _rest(rest)])


def tcot_parts(tcot: TCoT) -> Html:
    """The three parts under their names; JSON objects are set apart. Parts that were not found are left out."""
    named = (("Thinking", tcot.thinking), ("Rethink", tcot.rethink), ("Answer", tcot.answer))
    return join(
        tag("section", tag("h5", name), tag("p", _with_json(content), dir="auto"), class_=f"part {name.lower()}")
        for name, content in named
        if content
    )


def raw_tcot(tcot: TCoT) -> Html:
    """The T-CoT as it was written, its tags set apart."""
    spans = [match.span() for match in _TAG.finditer(tcot.text[:MAX_TEXT])]
    return tag("pre", _set_apart(tcot.text, spans, "b"), dir="auto")


def _with_json(text: str) -> Html:
    return _set_apart(text, [(start, end) for start, end, _ in find_objects(text[:MAX_TEXT])], "code")


def _set_apart(text: str, spans: Sequence[tuple[int, int]], element: str) -> Html:
    parts: list[str | None] = []
    last = 0
    for start, end in spans:
        parts += [text[last:start], tag(element, text[start:end])]
        last = end
    return join([*parts, text[last:MAX_TEXT], _rest(len(text) - MAX_TEXT)])


def _rest(count: int) -> Html | None:
    return tag("span", f" … {count:,} more characters", class_="cut") if count > 0 else None


def _pattern(keyword: str) -> re.Pattern[str] | None:
    words = keyword.split()
    return re.compile(r"\s+".join(map(re.escape, words)), re.IGNORECASE) if words else None


def _places(text: str, keywords: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, end, number of the keyword), left to right and apart from each other."""
    found: list[tuple[int, int, int]] = []
    by_length = sorted(range(len(keywords)), key=lambda number: -len(keywords[number]))
    for number in by_length:
        pattern = _pattern(keywords[number])
        for match in pattern.finditer(text) if pattern else ():
            start, end = match.span()
            before = bisect_left(found, (start,))
            if before and found[before - 1][1] > start:
                continue
            if bisect_right(found, (end - 1, len(text) + 1)) > before:
                continue
            found.insert(before, (start, end, number))
    return found
