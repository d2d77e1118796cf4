# SPDX-License-Identifier: Apache-2.0
"""What several scripts of `data_preprocess/` share: public instructions, which answers are the same, document pages."""

from __future__ import annotations

import hashlib
import re

from embedrl_verl.convert.converter import RawRow, RowError, as_images, show
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.identity import ANSWER_ID, normalise_text
from embedrl_verl.data.schema import Media
from embedrl_verl.errors import DataError

QUESTION = "Represent the given image with the following question:"
FIND_PAGE = "Find a document image that matches the given query:"
UNDERSTAND_PAGE = "Understand the content of the provided document image."

LONGEST_PLAIN_ID = 120
_ARTICLE = re.compile(r"(?:a|an|the) (?=\S)")
_QUOTED = re.compile(r"(?P<quote>['\"])(?P<inside>[^'\"]+)(?P=quote)|“(?P<typeset>[^”]+)”")


def answer_id(text: str) -> str:
    """`target_id` of an answer or a label. Case, width, white space, closing punctuation, quotes around the whole and a
    leading article do not count: "A cab." is "cab". Signs, units and decimal points do."""
    plain = normalise_text(text)
    core = plain.rstrip(" .,;:!?")
    quoted = _QUOTED.fullmatch(core)
    core = (quoted["inside"] or quoted["typeset"]).rstrip(" .,;:!?") if quoted else core
    core = _ARTICLE.sub("", core, count=1) if _ARTICLE.match(core) else core
    core = core or plain
    if len(core) > LONGEST_PLAIN_ID:
        core = "sha256-" + hashlib.sha256(core.encode()).hexdigest()[:32]
    return f"{ANSWER_ID}{core}"


def split_instruction(text: str, instruction: str) -> tuple[str, str]:
    """(instruction as the text spells it, rest); ("", text) if the stripped text does not begin with it. A final stop
    or colon may be there or not. What follows must be set off by white space."""
    words = re.escape(instruction.rstrip(".:"))
    found = re.fullmatch(rf"({words}[.:]?)(?:\s+(.*))?", text, re.DOTALL)
    return (found[1], (found[2] or "").strip()) if found else ("", text)


def train_files(root: InputRoot, repository: str) -> list[str]:
    """Parquet or Arrow files of the split train."""
    for pattern in ("**/train-*.parquet", "**/train/*.parquet", "train/*.arrow", "*.arrow"):
        if files := root.files(pattern):
            return files
    raise DataError(f"no train-*.parquet and no train/*.arrow; the input must be {repository} or a copy of it")


def page_images(row: RawRow) -> tuple[Media, ...]:
    images = as_images(row.value("image"), "image")
    if not images:
        raise RowError("image", f"must be the image of a page; got {show(row.value('image'))}")
    return images


def question_of(row: RawRow) -> str:
    question = row.text("query").strip()
    if not question:
        raise RowError("query", "must have a text; it is empty")
    return question
