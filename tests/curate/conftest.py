# SPDX-License-Identifier: Apache-2.0
"""Records and files that the tests of curation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs

MakePair = Callable[..., PairRecord]
WriteParts = Callable[..., list[Path]]
ReadAll = Callable[[Path], list[PairRecord]]


@pytest.fixture
def pair() -> MakePair:
    """`pair("p1", source="s", target=Item(...), target_id="", query=Item(...), query_id="")`."""

    def make(
        pair_id: str,
        source: str = "s",
        target: Item | None = None,
        target_id: str = "",
        query: Item | None = None,
        query_id: str = "",
    ) -> PairRecord:
        target, query = target or Item(text=f"answer {pair_id}"), query or Item(text=f"question {pair_id}")
        return PairRecord(pair_id, source, "Find it.", query, target, target_id, query_id=query_id)

    return make


@pytest.fixture
def write_parts(tmp_path: Path) -> WriteParts:
    """`write_parts("name", records, sizes)`: parquet files of so many records each; the last one takes the rest."""

    def write(name: str, records: Sequence[PairRecord], sizes: Sequence[int] = ()) -> list[Path]:
        files, start = [], 0
        for number, size in enumerate([*sizes, len(records)]):
            file = tmp_path / name / f"part-{number:05d}.parquet"
            write_pairs(records[start : start + size], file)
            files.append(file)
            start += size
        return files

    return write


@pytest.fixture
def read_all() -> ReadAll:
    """All records of a data set folder."""

    def read(folder: Path) -> list[PairRecord]:
        return [record for part in sorted(folder.glob("part-*.parquet")) for record in read_pairs(part)]

    return read
