# SPDX-License-Identifier: Apache-2.0
"""VisRAG's in-domain training set (openbmb/VisRAG-Ret-Train-In-domain-data) as pair records: question → page.

python data_preprocess/visrag_train.py --input openbmb/VisRAG-Ret-Train-In-domain-data --out data/visrag

Files: `data/train-*.parquet`.

| column | becomes |
|---|---|
| query | query text |
| image {bytes, path} | target page. The same bytes are the same content: `path` numbers rows, not pages |
| source | the instructions of both sides; all sources are one data source, `visrag` |

The reference says to each query, and to each page, what kind of page it is about, in a sentence for each source. We do
the same in our own words, or with `--prompts benchmark` say the same to all: the strings of the retrieval benchmark,
which do not tell the source. A row of an unknown source gets those too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.common import FIND_PAGE, UNDERSTAND_PAGE, page_images, question_of, train_files
from embedrl_verl.convert.converter import Converter, RawRow, Shard, option
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.schema import Item, PairRecord

SOURCE = "visrag"
BENCHMARK = (FIND_PAGE, UNDERSTAND_PAGE)
WORDS = {
    "ArxivQA": (
        "Find the figure of a scientific paper that answers this question:",
        "Represent this figure of a scientific paper.",
    ),
    "ChartQA": (
        "Find the chart whose numbers or categories answer this question:",
        "Represent this chart of numbers or categories.",
    ),
    "MP-DocVQA": (
        "Find the page of a longer document that answers this question:",
        "Represent this page of a longer document.",
    ),
    "InfoVQA": ("Find the infographic that answers this question:", "Represent this infographic."),
    "PlotQA": ("Find the plot whose data answer this question:", "Represent this plot of data."),
    "SlideVQA": ("Find the presentation slide that answers this question:", "Represent this presentation slide."),
}
"""Source -> our wording, said to the query and to the page."""


@dataclass(frozen=True)
class VisRagTrain(Converter):
    prompts: str = option(
        "by_source",
        "by_source: a sentence for each kind of page (our wording); benchmark: the same for all",
        ("by_source", "benchmark"),
    )

    name = "visrag_in_domain"

    def shards(self, root: InputRoot) -> list[Shard]:
        return [Shard(file, SOURCE) for file in train_files(root, "openbmb/VisRAG-Ret-Train-In-domain-data")]

    def convert(self, row: RawRow) -> PairRecord:
        question = question_of(row)
        by_source = self.prompts == "by_source"
        to_query, to_page = WORDS.get(row.text("source", ""), BENCHMARK) if by_source else BENCHMARK
        target = Item(images=page_images(row), kind="page", instruction=to_page)
        return PairRecord(row.pair_id(), row.shard.source, to_query, Item(text=question), target)


if __name__ == "__main__":
    sys.exit(convert_main(VisRagTrain, __doc__))
