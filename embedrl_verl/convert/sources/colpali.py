# SPDX-License-Identifier: Apache-2.0
"""ViDoRe's training set (hub repository vidore/colpali_train_set): questions about single pages, in two readings.

Files: `data/train-*.parquet` (the split `test` is left alone). Columns: image {bytes, path}, image_filename, query,
answer, source (pdf, docvqa, tatdqa, Infographic-VQA, arxiv_qa), options, page, model, prompt, answer_type. `image.path`
is not unique ("page_9.jpg"); the bytes count. A list of images is a document of several pages.

| reading | query | target | data source |
|---|---|---|---|
| answer | page + question | answer text | vidore_colpali |
| page | question | page | vidore_colpali_pages |

"answer" is what the reference mixture trains, "page" is what the retrieval tests ask. A row without an answer is not
used in the reading "answer".

Cells of `answer` and `options` may be lists written out as strings. With `answers="clean"` a list (of the sources pdf
and tatdqa) is one answer in parts and is joined with ", ", and the letter of an option (arxiv_qa) becomes the option's
text; a letter beside options that cannot be read is refused, since all such rows would share it as their target. With
"raw" the cell is the target as it stands, as in the reference. The sources docvqa and Infographic-VQA have a second
line in the question that asks for a short answer ("Answer briefly."); the reading "page" leaves it out.

The reference says no instruction; in the reading "answer" ours is that of MMEB's questions, in "page" that of the
retrieval benchmark.

Same content: answers by their words; pages by source, file name and page number, without a file name by their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from embedrl_verl.convert.answers import answer_id, listed, option_letter, without_letter
from embedrl_verl.convert.converter import InputRoot, RawRow, RowError, Setting, Shard, show
from embedrl_verl.convert.instructions import FIND_PAGE, QUESTION, UNDERSTAND_PAGE
from embedrl_verl.convert.sources import COLPALI, COLPALI_PAGES
from embedrl_verl.data.schema import Item, Media, PairRecord
from embedrl_verl.errors import ConfigError, DataError

Reading = Literal["answer", "page"]
Answers = Literal["clean", "raw"]
SOURCES = {"answer": COLPALI, "page": COLPALI_PAGES}
ASKED_BRIEFLY = ("docvqa", "Infographic-VQA")
FILES = (
    ("data/train-*.parquet", "train-*.parquet", "**/train-*.parquet"),
    ("**/train/*.parquet",),
    ("train/*.arrow", "*.arrow"),
)


@dataclass(frozen=True)
class ColPaliTrain:
    """Converter of vidore/colpali_train_set.

    Args:
        reading: "answer" or "page".
        answers: "clean" or "raw", see above; the reading "page" does not use them.
    """

    reading: Reading = "answer"
    answers: Answers = "clean"

    name = "colpali_train_set"
    licence = "not declared"

    def __post_init__(self) -> None:
        for field, values in (("reading", get_args(Reading)), ("answers", get_args(Answers))):
            if getattr(self, field) not in values:
                raise ConfigError(f"{field} must be one of {', '.join(values)}; got {getattr(self, field)!r}")

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The reading, and how answers are read."""
        return {"reading": self.reading, "answers": self.answers}

    def shards(self, root: InputRoot) -> list[Shard]:
        """Files of the split train. Raises DataError if there are none."""
        return [Shard(file, SOURCES[self.reading]) for file in train_files(root, "vidore/colpali_train_set")]

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pair of a row, or none. Raises RowError."""
        question = row.text("query").strip()
        if not question:
            raise RowError("query", "must have a text; it is empty")
        page = page_images(row)
        if self.reading == "page":
            if row.text("source", "") in ASKED_BRIEFLY:
                question = question.partition("\n")[0].strip()
            query = Item(text=question)
            target = Item(images=page, kind="page", instruction=UNDERSTAND_PAGE)
            return [PairRecord(row.pair_id(), row.shard.source, FIND_PAGE, query, target, _page_id(row))]
        answer = self._answer(row)
        if not answer:
            return []
        query = Item(text=question, images=page, kind="page")
        return [PairRecord(row.pair_id(), row.shard.source, QUESTION, query, Item(text=answer), answer_id(answer))]

    def _answer(self, row: RawRow) -> str:
        value = row.value("answer")
        if value is None:
            return ""
        if self.answers == "raw":
            return row.text("answer").strip()
        parts = listed(value)
        if parts is not None:
            return ", ".join(part for part in parts if part)
        answer = row.text("answer").strip()
        cell = row.value("options", None)
        options = listed(cell)
        if options is not None:
            return _chosen(answer, options)
        absent = cell is None or (isinstance(cell, str) and not cell.strip())
        if not absent and option_letter(answer) is not None:
            raise RowError(
                "options", f"must be a list of texts when the answer is a letter ({show(answer)}); got {show(cell)}"
            )
        return answer


def train_files(root: InputRoot, repository: str) -> list[str]:
    """Parquet or Arrow files of the split train. Raises DataError if there are none."""
    for patterns in FILES:
        files = root.files(*patterns)
        if files:
            return files
    raise DataError(f"no train-*.parquet and no train/*.arrow; the input must be {repository} or a copy of it")


def page_images(row: RawRow) -> tuple[Media, ...]:
    """The images of the column `image`. Raises RowError if there is none."""
    images = row.images("image")
    if not images:
        raise RowError("image", f"must be the image of a page; got {show(row.value('image'))}")
    return images


def _chosen(answer: str, options: list[str]) -> str:
    """Text of the option that an answer names by its letter; another answer without the letter before it.

    Options without letters are counted: "A" is the first.
    """
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


def _page_id(row: RawRow) -> str:
    name = row.text("image_filename", "").strip()
    return f"page:{row.text('source', '')}:{name}:{row.text('page', '')}" if name else ""
