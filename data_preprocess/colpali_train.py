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
OPTION = re.compile(r"\(?(?P<letter>[A-Z])(?:[.):]+\s*(?P<text>.*))?", re.DOTALL)


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
    """An answer in parts joined; the text of the option that a letter names (options without letters are counted: "A"
    is the first), without the letter before it; any other answer as it is."""
    if (parts := listed(row.value("answer"))) is not None:
        return ", ".join(filter(None, parts))
    answer, cell = row.text("answer", "").strip(), row.value("options", None)
    letter, text = split_option(answer)
    options = listed(cell)
    if options is None:
        if letter and not text and cell is not None and str(cell).strip():
            rule = f"must be a list of texts when the answer is a letter ({show(answer)})"
            raise RowError("options", f"{rule}; got {show(cell)}")
        return answer
    if letter is None or text:
        return text
    lettered = [(known, words) for known, words in map(split_option, options) if known and words]
    place = ord(letter) - ord("A")
    found = [words for known, words in lettered if known == letter] if lettered else options[place : place + 1]
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


def split_option(text: str) -> tuple[str | None, str]:
    """("B", "two bars") of "B. two bars"; ("B", "") of a lone letter, as "B", "B." or "(B)"; else (None, the text)."""
    found = OPTION.fullmatch(text.strip())
    return (found["letter"], (found["text"] or "").strip()) if found else (None, text.strip())


if __name__ == "__main__":
    sys.exit(convert_main(ColPaliTrain, __doc__))
