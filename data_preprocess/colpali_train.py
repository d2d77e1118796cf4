# SPDX-License-Identifier: Apache-2.0
"""ViDoRe's training set (vidore/colpali_train_set) as pair records: questions about single pages, in two readings.

python data_preprocess/colpali_train.py --input vidore/colpali_train_set --preset paper_caps --out data/colpali

Files: `data/train-*.parquet` (the split `test` is left alone). Columns: image {bytes, path}, image_filename, query,
answer, source (pdf, docvqa, tatdqa, Infographic-VQA, arxiv_qa), options, page, model, prompt, answer_type. `image.path`
is not unique ("page_9.jpg"); the bytes count. A list of images is a document of several pages.

| reading | query | target | data source |
|---|---|---|---|
| answer | page + question | answer text | vidore_colpali |
| page | question | page | vidore_colpali_pages |

"answer" is what the reference mixture trains, "page" is what the retrieval tests ask. A row without an answer is not
used in the reading "answer".

Cells of `answer` and `options` may be lists written out as strings: an answer in parts (pdf, tatdqa) is joined with
", ", and the letter of an option (arxiv_qa) becomes its text. A letter beside options that cannot be read is refused,
since all such rows would share it as their target. docs/data.md has more.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from typing import Any

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.common import (
    FIND_PAGE,
    QUESTION,
    UNDERSTAND_PAGE,
    answer_id,
    page_images,
    question_of,
    train_files,
)
from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard, option, show
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.schema import Item, PairRecord

SOURCES = {"answer": "vidore_colpali", "page": "vidore_colpali_pages"}
"""Reading -> data source."""
ASKED_BRIEFLY = ("docvqa", "Infographic-VQA")
LETTER = re.compile(r"\(?(?P<letter>[A-Z])\)?[.):]*")
OPTION = re.compile(r"\(?(?P<letter>[A-Z])[.):]+\s*(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class ColPaliTrain(Converter):
    reading: str = option("answer", "what is found: the answer to page and question, or the page", tuple(SOURCES))
    answers: str = option("clean", "written-out lists joined and letters resolved, or raw", ("clean", "raw"))

    name = "colpali_train_set"

    def shards(self, root: InputRoot) -> list[Shard]:
        return [Shard(file, SOURCES[self.reading]) for file in train_files(root, "vidore/colpali_train_set")]

    def convert(self, row: RawRow) -> PairRecord | None:
        question, page = question_of(row), page_images(row)
        if self.reading == "page":
            if row.text("source", "") in ASKED_BRIEFLY:
                question = question.partition("\n")[0].strip()
            query = Item(text=question)
            target = Item(images=page, kind="page", instruction=UNDERSTAND_PAGE)
            return PairRecord(row.pair_id(), row.shard.source, FIND_PAGE, query, target, page_id(row))
        is_plain = row.value("answer") is None or self.answers == "raw"
        answer = row.text("answer", "").strip() if is_plain else clean_answer(row)
        if not answer:
            return None
        query = Item(text=question, images=page, kind="page")
        return PairRecord(row.pair_id(), row.shard.source, QUESTION, query, Item(text=answer), answer_id(answer))


def page_id(row: RawRow) -> str:
    name = row.text("image_filename", "").strip()
    return f"page:{row.text('source', '')}:{name}:{row.text('page', '')}" if name else ""


def clean_answer(row: RawRow) -> str:
    parts = listed(row.value("answer"))
    if parts is not None:
        return ", ".join(part for part in parts if part)
    answer, cell = row.text("answer", "").strip(), row.value("options", None)
    options = listed(cell)
    if options is not None:
        return chosen(answer, options)
    absent = cell is None or (isinstance(cell, str) and not cell.strip())
    if not absent and option_letter(answer) is not None:
        rule = f"must be a list of texts when the answer is a letter ({show(answer)})"
        raise RowError("options", f"{rule}; got {show(cell)}")
    return answer


def chosen(answer: str, options: list[str]) -> str:
    """Text of the option that an answer names by its letter (options without letters are counted: "A" is the first);
    another answer without the letter before it."""
    letter = option_letter(answer)
    if letter is None:
        return without_letter(answer)[1]
    lettered = [without_letter(option) for option in options]
    if any(known for known, _ in lettered):
        found = [text for known, text in lettered if known == letter and text]
    else:
        place = ord(letter) - ord("A")
        found = options[place : place + 1]
    if len(found) != 1:
        raise RowError("answer", f"must name one of the options; got {show(answer)} and options {show(options)}")
    return found[0]


def listed(value: Any) -> list[str] | None:
    """The elements, as strings, of a list or of a list that was written out as a string ("['a', 'b']"); None for
    anything else. Nothing is evaluated but Python literals."""
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
    return found["letter"] if (found := LETTER.fullmatch(answer.strip())) else None


def without_letter(text: str) -> tuple[str | None, str]:
    """(letter, text) of an option as "B. two bars"; (None, the option) without a letter."""
    found = OPTION.fullmatch(text.strip())
    return (found["letter"], found["text"].strip()) if found else (None, text.strip())


if __name__ == "__main__":
    sys.exit(convert_main(ColPaliTrain, __doc__))
