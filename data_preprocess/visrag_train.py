# SPDX-License-Identifier: Apache-2.0
"""VisRAG's in-domain training set (openbmb/VisRAG-Ret-Train-In-domain-data) as pair records: question → page.

python data_preprocess/visrag_train.py --input openbmb/VisRAG-Ret-Train-In-domain-data --out data/visrag

Files: `data/train-*.parquet`.

| column | becomes |
|---|---|
| query | query text |
| image {bytes, path} | target page. The same bytes are the same content: `path` numbers rows, not pages |
| source | the instructions of both sides; all sources are one data source, `visrag` |

`--prompts benchmark` says the same to all: the strings of the retrieval benchmark. Rows of an unknown
source get those too.
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
WORDS = {
    "ArxivQA": ("figure of a scientific paper that answers", "figure of a scientific paper"),
    "ChartQA": ("chart whose numbers or categories answer", "chart of numbers or categories"),
    "MP-DocVQA": ("page of a longer document that answers", "page of a longer document"),
    "InfoVQA": ("infographic that answers", "infographic"),
    "PlotQA": ("plot whose data answer", "plot of data"),
    "SlideVQA": ("presentation slide that answers", "presentation slide"),
}
"""Source -> our wording, said to the query and to the page."""


@dataclass(frozen=True)
class VisRagTrain(Converter):
    prompts: str = option("by_source", "words for each kind of page, or the same for all", ("by_source", "benchmark"))

    name = "visrag_in_domain"

    def shards(self, root: InputRoot) -> list[Shard]:
        return [Shard(file, SOURCE) for file in train_files(root, "openbmb/VisRAG-Ret-Train-In-domain-data")]

    def convert(self, row: RawRow) -> PairRecord:
        source = row.text("source", "") if self.prompts == "by_source" else ""
        to_query, to_page = FIND_PAGE, UNDERSTAND_PAGE
        if source in WORDS:
            asked, shown = WORDS[source]
            to_query, to_page = f"Find the {asked} this question:", f"Represent this {shown}."
        query, target = Item(text=question_of(row)), Item(images=page_images(row), kind="page", instruction=to_page)
        return PairRecord(row.pair_id(), row.shard.source, to_query, query, target)


if __name__ == "__main__":
    sys.exit(convert_main(VisRagTrain, __doc__))
