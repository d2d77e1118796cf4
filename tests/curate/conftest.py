# SPDX-License-Identifier: Apache-2.0
"""Records and files that the tests of curation share; each test runs in a folder of its own."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate.content_ids import IdSettings, fill_content_ids
from embedrl_verl.curate.split import SplitSettings
from embedrl_verl.curate.split_job import split_pairs
from embedrl_verl.data.files import REJECTED_FILE
from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(pair_id, source="s", target=None, query=None, **ids):
    query, target = query or Item(text=f"question {pair_id}"), target or Item(text=f"answer {pair_id}")
    return PairRecord(pair_id, source, "Find it.", query, target, **ids)


def write_parts(name, records, sizes=()):
    """Parquet files of so many records each; the last one takes the rest."""
    files, start = [], 0
    for number, size in enumerate([*sizes, len(records)]):
        files.append(Path(name, f"part-{number:05d}.parquet"))
        write_pairs(records[start : start + size], files[-1])
        start += size
    return files


def spoil(file, change):
    """Write the file again, its rows (dicts) changed in place; in row groups of three."""
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=3)


def read_all(folder):
    return [record for part in sorted(Path(folder).glob("part-*.parquet")) for record in read_pairs(part)]


def rejected(folder):
    return [*map(json.loads, Path(folder, REJECTED_FILE).read_text().splitlines())]


def fill(files, out="out", workers=1, rows_per_part=50_000, max_bad_share=0.01, **settings):
    """The report of content-ids, and the records in `out`."""
    limits = {"workers": workers, "rows_per_part": rows_per_part, "max_bad_share": max_bad_share}
    return fill_content_ids(files, out, IdSettings(**settings), **limits), read_all(out)


def split(files, verdicts, out="out", workers=1, rows_per_part=100, max_bad_share=0.01, **settings):
    """The report of split, and the contrastive and the RL records in `out`."""
    limits = {"workers": workers, "rows_per_part": rows_per_part, "max_bad_share": max_bad_share}
    report = split_pairs(files, verdicts, out, SplitSettings(**settings), **limits)
    return report, read_all(f"{out}/contrastive"), read_all(f"{out}/rl")
