# SPDX-License-Identifier: Apache-2.0
"""Records and files that the tests of curation share."""

import json

import pytest

from embedrl_verl.curate.content_ids import IdSettings, fill_content_ids
from embedrl_verl.data.files import REJECTED_FILE
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs


@pytest.fixture
def pair():
    """`pair("p1", source="s", target=Item(...), target_id="", query=Item(...), query_id="")`."""

    def make(pair_id, source="s", target=None, target_id="", query=None, query_id=""):
        target, query = target or Item(text=f"answer {pair_id}"), query or Item(text=f"question {pair_id}")
        return PairRecord(pair_id, source, "Find it.", query, target, target_id, query_id=query_id)

    return make


@pytest.fixture
def write_parts(tmp_path):
    """`write_parts("name", records, sizes)`: parquet files of so many records each; the last one takes the rest."""

    def write(name, records, sizes=()):
        files, start = [], 0
        for number, size in enumerate([*sizes, len(records)]):
            file = tmp_path / name / f"part-{number:05d}.parquet"
            write_pairs(records[start : start + size], file)
            files.append(file)
            start += size
        return files

    return write


@pytest.fixture
def read_all():
    """All records of a data set folder."""

    def read(folder):
        return [record for part in sorted(folder.glob("part-*.parquet")) for record in read_pairs(part)]

    return read


@pytest.fixture
def rejected():
    """Row and field of every line of a folder's `rejected.jsonl`."""

    def read(folder):
        lines = map(json.loads, (folder / REJECTED_FILE).read_text().splitlines())
        return [(line["row"], line["field"]) for line in lines]

    return read


@pytest.fixture
def fill(tmp_path, read_all):
    """`fill(files, "out", overwrite=True)`: the report of content-ids, and the records in `out`."""

    def run(files, out="out", max_bad_share=0.01, workers=1, rows_per_part=50_000, **settings):
        limits = {"max_bad_share": max_bad_share, "workers": workers, "rows_per_part": rows_per_part}
        report = fill_content_ids(files, tmp_path / out, IdSettings(**settings), **limits)
        return report, read_all(tmp_path / out)

    return run
