# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import DataError
from embedrl_verl.report.rows import choose, index_rows, read_rows, rows_with_ids


def write(path: Path, sources: list[str]) -> Path:
    """A file of text pairs `NAME-ROW`; a source "" makes a row that is no record."""
    pairs = [
        PairRecord(f"{path.stem}-{row}", name or "x", "", Item("q"), Item("t"), "") for row, name in enumerate(sources)
    ]
    write_pairs(pairs, path)
    rows = pq.read_table(path).to_pylist()
    for row, name in zip(rows, sources, strict=True):
        row["data_source"] = name or None
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=7)
    return path


def test_rows_are_counted_by_source_over_all_files(tmp_path: Path) -> None:
    index = index_rows(
        [write(tmp_path / "a.parquet", ["s"] * 20 + ["t"]), write(tmp_path / "b.parquet", ["t", "", "u"])]
    )
    assert len(index) == 24 and index.counts() == {"s": 20, "t": 2, "u": 1, "(no source)": 1}


def test_every_source_is_shown_and_shares_follow_sizes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", ["large"] * 300 + ["small"] * 30 + ["tiny"])
    index = index_rows([file])
    names = [index.sources[index.codes[row]] for row in choose(index, 34)]
    assert Counter(names) == {"large": 30, "small": 3, "tiny": 1}
    assert len(choose(index, 2)) == 2 and len(choose(index, 1)) == 1
    assert choose(index, 1000) == list(range(331))


def test_choice_is_even_or_drawn_by_the_seed(tmp_path: Path) -> None:
    index = index_rows([write(tmp_path / "a.parquet", ["s"] * 101)])
    assert choose(index, 5) == [0, 25, 50, 75, 100]
    assert choose(index, 20, seed=1) == choose(index, 20, seed=1) != choose(index, 20, seed=2)
    assert len(set(choose(index, 20, seed=1))) == 20


def test_chosen_rows_are_read_in_order_with_file_and_row(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.parquet", ["s"] * 40), write(tmp_path / "b.parquet", ["s", "", *["s"] * 38])]
    index = index_rows(files)
    rows = list(read_rows(index, [79, 3, 41, 6, 7, 40]))
    assert [(row.file.stem, row.row) for row in rows] == [("a", 3), ("a", 6), ("a", 7), ("b", 0), ("b", 1), ("b", 39)]
    records = [row.found for row in rows]
    assert [one.pair_id for one in records if isinstance(one, PairRecord)] == ["a-3", "a-6", "a-7", "b-0", "b-39"]
    assert "b.parquet, row 1" in str(records[4])


def test_rows_are_found_by_id_and_a_missing_id_is_named(tmp_path: Path) -> None:
    index = index_rows([write(tmp_path / "a.parquet", ["s"] * 9)])
    assert rows_with_ids(index, ["a-8", "a-0"]) == [8, 0]
    with pytest.raises(DataError, match="'nobody'"):
        rows_with_ids(index, ["a-1", "nobody"])


def test_files_without_rows_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows in"):
        index_rows([write(tmp_path / "empty.parquet", [])])
    whole = write(tmp_path / "a.parquet", ["s"] * 40)
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet"):
        index_rows([whole])


def test_a_data_set_folder_brings_its_media_root(tmp_path: Path) -> None:
    (tmp_path / "set" / "media").mkdir(parents=True)
    write(tmp_path / "set" / "part-00000.parquet", ["s"])
    assert index_rows([tmp_path / "set"]).media_roots == (str(tmp_path / "set" / "media"),)
    assert index_rows([tmp_path / "set"], media_root="else").media_roots == ("else",)
