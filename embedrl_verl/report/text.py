# SPDX-License-Identifier: Apache-2.0
"""Texts in pieces, for a template to mark some of them: keywords, JSON objects, the tags of a T-CoT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from embedrl_verl.tcot.json_objects import find_objects

MAX_TEXT = 8_000
"""Characters of one text that are shown."""
MAX_KEYWORDS = 64
_TAG = re.compile(r"</?(?:thinking|rethink|answer)>")
Piece = tuple[str, int | None]


def is_in_text(keyword: str, text: str) -> bool:
    """Whether the keyword stands in the text, letter case and white space aside."""
    return re.search(_pattern(keyword), text, re.IGNORECASE) is not None


def keywords_apart(text: str, keywords: Sequence[str]) -> Iterator[Piece]:
    """Keywords come with their number, other text with None. Of several in one place the longest is marked."""
    numbers = sorted(range(len(keywords[:MAX_KEYWORDS])), key=lambda number: -len(keywords[number]))
    either = re.compile("|".join(f"({_pattern(keywords[number])})" for number in numbers), re.IGNORECASE)
    found = either.finditer(text[:MAX_TEXT]) if numbers else ()
    return _apart(text, ((*match.span(), numbers[(match.lastindex or 1) - 1]) for match in found))


def json_apart(text: str) -> Iterator[Piece]:
    return _apart(text, ((start, end, 0) for start, end, _ in find_objects(text[:MAX_TEXT])))


def tags_apart(text: str) -> Iterator[Piece]:
    return _apart(text, ((*match.span(), 0) for match in _TAG.finditer(text[:MAX_TEXT])))


def _apart(text: str, places: Iterable[tuple[int, int, int]]) -> Iterator[Piece]:
    last = 0
    for start, end, number in places:
        yield text[last:start], None
        yield text[start:end], number
        last = end
    yield text[last:MAX_TEXT], None


def _pattern(keyword: str) -> str:
    words = keyword.split()
    return r"\s+".join(map(re.escape, words)) if words else "(?!)"  # without words: nowhere
