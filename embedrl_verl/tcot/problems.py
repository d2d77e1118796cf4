# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a T-CoT, one line a rule however often the rule is broken.

A policy may write thousands of bad entries; what is logged for a row must stay short.
"""

from __future__ import annotations

import reprlib
from collections import Counter

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class Problems:
    """Broken rules in the order in which they were first met, with a count and the first offending value."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: Counter[str] = Counter()

    def add(self, rule: str, value: object = None) -> None:
        """Record one breach of `rule`; `value` (None = the rule says it all) is shortened to a line."""
        if rule not in self._first:
            self._first[rule] = "" if value is None else f"; got {_SHORT.repr(value)}"
        self._count[rule] += 1

    def lines(self) -> tuple[str, ...]:
        """One line a rule, such as "key frames are counted from 1; got 0 (and 2 more)"."""
        more = {rule: f" (and {count - 1} more)" if count > 1 else "" for rule, count in self._count.items()}
        return tuple(rule + first + more[rule] for rule, first in self._first.items())
