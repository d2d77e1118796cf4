# SPDX-License-Identifier: Apache-2.0
"""Short answers of question-answering sets: which are the same, and what the odd spellings of a cell mean."""

from __future__ import annotations

import ast
import hashlib
import re
from typing import Any

from embedrl_verl.data.identity import ANSWER_ID, normalise_text

LONGEST_PLAIN_ID = 120
_ARTICLE = re.compile(r"(?:a|an|the) (?=\S)")
_QUOTED = re.compile(r"(?P<quote>['\"])(?P<inside>[^'\"]+)(?P=quote)|“(?P<typeset>[^”]+)”")
_LETTER = re.compile(r"\(?(?P<letter>[A-Z])\)?[.):]*")
_OPTION = re.compile(r"\(?(?P<letter>[A-Z])[.):]+\s*(?P<text>.*)", re.DOTALL)


def answer_id(text: str) -> str:
    """`target_id` of an answer or a label: equal for answers that differ in nothing that a reader would mind.

    Case, width, white space, closing punctuation, quotes around the whole and a leading article do not count: "A cab."
    is "cab". Signs, units and decimal points do. Two pairs with such targets must not be negatives of each other.
    """
    plain = normalise_text(text)
    core = plain.rstrip(" .,;:!?")
    quoted = _QUOTED.fullmatch(core)
    core = (quoted["inside"] or quoted["typeset"]).rstrip(" .,;:!?") if quoted else core
    core = _ARTICLE.sub("", core, count=1) if _ARTICLE.match(core) else core
    core = core or plain
    if len(core) > LONGEST_PLAIN_ID:
        core = "sha256-" + hashlib.sha256(core.encode()).hexdigest()[:32]
    return f"{ANSWER_ID}{core}"


def listed(value: Any) -> list[str] | None:
    """The elements of a list, or of a list that was written out as a string ("['a', 'b']"); None for anything else.

    Elements that are numbers become strings; nothing is evaluated but Python literals.
    """
    if isinstance(value, str):
        stripped = value.strip()
        if not (stripped.startswith("[") and stripped.endswith("]")):
            return None
        try:
            value = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if not isinstance(value, list | tuple) or not all(isinstance(part, str | int | float) for part in value):
        return None
    return [str(part).strip() for part in value]


def option_letter(answer: str) -> str | None:
    """The letter if the answer is nothing but the letter of an option, as "D", "D." or "(D)"."""
    found = _LETTER.fullmatch(answer.strip())
    return found["letter"] if found else None


def without_letter(option: str) -> tuple[str | None, str]:
    """(letter, text) of an option as "B. two bars"; (None, the option) without a letter."""
    found = _OPTION.fullmatch(option.strip())
    return (found["letter"], found["text"].strip()) if found else (None, option.strip())
