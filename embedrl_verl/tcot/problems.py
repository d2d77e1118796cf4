# SPDX-License-Identifier: Apache-2.0
"""A list of what is wrong, one line a rule however often the rule is broken.

A policy may write thousands of bad entries; what is logged for a row must stay short.
"""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class Problems:
    """Broken rules in the order in which they were first met, with a count and the first offending value."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: dict[str, int] = {}

    def add(self, rule: str, value: object = None) -> None:
        """Record one breach of `rule`; `value` (None = the rule says it all) is shortened to a line."""
        self._count[rule] = self._count.get(rule, 0) + 1
        if rule not in self._first:
            self._first[rule] = "" if value is None else f"; got {_SHORT.repr(value)}"

    def lines(self) -> tuple[str, ...]:
        """One line a rule, such as "key frames are counted from 1; got 0 (and 2 more)"."""
        return tuple(
            rule + first + (f" (and {self._count[rule] - 1} more)" if self._count[rule] > 1 else "")
            for rule, first in self._first.items()
        )
