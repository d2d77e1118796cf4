# SPDX-License-Identifier: Apache-2.0
"""VisRAG's in-domain training set (hub repository openbmb/VisRAG-Ret-Train-In-domain-data): question → page.

Files: `data/train-*.parquet`. Columns: query, image {bytes, path}, source (ArxivQA, ChartQA, MP-DocVQA, InfoVQA,
PlotQA, SlideVQA). All rows are one data source, `visrag`.

The reference says to each query, and to each page, what kind of page it is about, in a sentence for each source. We do
the same in our own words (`instructions.VISRAG_WORDS`, not the reference's), or with `prompts="benchmark"` say the same
to all: the strings of the retrieval benchmark, which do not tell the source. A row of an unknown source gets those too.

Same content: pages by their bytes (`image.path` numbers rows, not pages).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from embedrl_verl.convert.converter import InputRoot, RawRow, RowError, Setting, Shard
from embedrl_verl.convert.instructions import FIND_PAGE, UNDERSTAND_PAGE, VISRAG_WORDS, VisRagWords
from embedrl_verl.convert.sources import VISRAG
from embedrl_verl.convert.sources.colpali import page_images, train_files
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import ConfigError

Prompts = Literal["by_source", "benchmark"]
BENCHMARK = VisRagWords(FIND_PAGE, UNDERSTAND_PAGE)


@dataclass(frozen=True)
class VisRagTrain:
    """Converter of openbmb/VisRAG-Ret-Train-In-domain-data."""

    prompts: Prompts = "by_source"

    name = "visrag_in_domain"
    licence = "not declared"

    def __post_init__(self) -> None:
        if self.prompts not in get_args(Prompts):
            raise ConfigError(f"prompts must be one of {', '.join(get_args(Prompts))}; got {self.prompts!r}")

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The choice of prompts."""
        return {"prompts": self.prompts}

    def shards(self, root: InputRoot) -> list[Shard]:
        """Files of the split train. Raises DataError if there are none."""
        return [Shard(file, VISRAG) for file in train_files(root, "openbmb/VisRAG-Ret-Train-In-domain-data")]

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pair of a row. Raises RowError."""
        question = row.text("query").strip()
        if not question:
            raise RowError("query", "must have a text; it is empty")
        words = BENCHMARK
        if self.prompts == "by_source":
            words = VISRAG_WORDS.get(row.text("source", ""), BENCHMARK)
        target = Item(images=page_images(row), kind="page", instruction=words.page)
        return [PairRecord(row.pair_id(), row.shard.source, words.query, Item(text=question), target, "")]
