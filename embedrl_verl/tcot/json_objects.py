# SPDX-License-Identifier: Apache-2.0
"""JSON objects in free text, in linear time and without recursion on what a policy wrote.

From each "{" that a key or "}" follows, the matching "}" is looked for (strings skipped), and what lies between is
given to `json`. A look-out ends at `MAX_DEPTH` open brackets, so at most a fixed number of look-outs pass over any one
character, and `json` never recurses deeper than that. Objects keep their pairs, because a key that is written twice
counts twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 12
"""Brackets open at once. Evidence needs five: object, list of boxes, box object, list of its boxes, box."""
MAX_INT_DIGITS = 18
"""Integers with more digits are read as floats: they fit no int64, and int() is quadratic in the digits."""

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_OPENING = re.compile(r'\{(?=\s*["}])')
_TOKEN = re.compile(rf'{_STRING}|["{{}}\[\]]', re.DOTALL)


class JsonObject(list[tuple[str, Any]]):
    """Pairs of a JSON object in the order in which they were written, repeated keys included."""

    def values_of(self, key: str) -> list[Any]:
        """All values of a key."""
        return [value for name, value in self if name == key]


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INT_DIGITS else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=JsonObject, parse_int=_integer)


def _end_of_object(text: str, start: int) -> int | None:
    """Index after the bracket that closes the one at `start`; None if it is never closed or nests too deep."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match.group()
        if token in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                return None
        elif token in "}]":
            depth -= 1
            if depth == 0:
                return match.end()
        elif token == '"':  # opens a string that never ends
            return None
    return None


def find_objects(text: str) -> Iterator[tuple[int, int, JsonObject]]:
    """(start, end, object) of every outermost JSON object in the text, left to right. Never raises.

    Inside something in braces that is not JSON, the search goes on.
    """
    opening = _OPENING.search(text)
    while opening:
        start, following = opening.span()
        end = _end_of_object(text, start)
        if end is not None:
            try:
                value = _DECODER.decode(text[start:end])
            except ValueError:  # balanced, but not JSON
                pass
            else:
                yield start, end, value
                following = end
        opening = _OPENING.search(text, following)
