# SPDX-License-Identifier: Apache-2.0
"""Which number a judge's answer names. Strict: a doubt is no answer, and no answer is unknown, not a miss."""

from __future__ import annotations

import re

# Decimals, ranges and negative numbers are read as a whole, so that no part of them passes for a choice.
_NUMBER = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*")


def parse_choice(text: str, n: int) -> int | None:
    """The number from 1 to `n` that the answer names, else None.

    It is the only number in the text, whatever words, brackets and punctuation stand around it; it may occur more than
    once ("3", "(3).", "Candidate 3", "Answer: 3, yes 3"). Two numbers, 0, a number above `n` or none: None.
    """
    numbers = {number.lstrip("0") for number in _NUMBER.findall(text)}
    listed = numbers & {str(number) for number in range(1, n + 1)}
    return int(listed.pop()) if len(numbers) == len(listed) == 1 else None


def is_whole_choice(text: str, n: int) -> bool:
    """Whether a text that the server cut off is one listed number all the same, and not the beginning of another."""
    number = text.strip()
    return [str(other) for other in range(1, n + 1) if str(other).startswith(number)] == [number]
