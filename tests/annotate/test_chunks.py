# SPDX-License-Identifier: Apache-2.0
"""The input is read once, in order, in chunks; bad rows and doubles are told and nothing else is lost."""

import random
import string
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.annotate.chunks import ChunkedInput
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import Item
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import DataError
from tests.annotate.fakes import pair_file, pairs


def read(source, wanted=lambda chunk: True):
    return [(chunk.number, [(row.row, row.pair_id) for row in rows]) for chunk, rows in source.read(wanted)]


def in_groups(path, count, group):
    """The same pairs in row groups of another size."""
    write_pairs(pairs(count), path)
    pq.write_table(pq.read_table(path), path, row_group_size=group)
    return path


@pytest.mark.parametrize("group", [1, 3, 4, 10, 1000])
def test_chunks_are_the_rows_in_order_whatever_the_row_groups(group, tmp_path):
    source = ChunkedInput([in_groups(tmp_path / "a.parquet", 10, group)], 4)
    rows = [(row, f"p{row}") for row in range(10)]
    assert read(source) == [(0, rows[:4]), (1, rows[4:8]), (2, rows[8:])]
    assert read(source, lambda chunk: chunk.number != 1) == [(0, rows[:4]), (2, rows[8:])]


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path, monkeypatch):
    path = in_groups(tmp_path / "a.parquet", 12, 4)
    source = ChunkedInput([path], 4)
    groups = []
    original = pq.ParquetFile.iter_batches

    def watched(self, *args, row_groups, **kwargs):
        groups.extend(row_groups)
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert [number for number, _ in read(source, lambda chunk: chunk.number == 2)] == [2]
    assert groups == [2]


def test_chunks_do_not_span_files_and_are_numbered_over_all(tmp_path):
    files = [pair_file(tmp_path / "a.parquet", 5), tmp_path / "b.parquet"]
    write_pairs(pairs(8)[5:], files[1])
    assert [(number, len(rows)) for number, rows in read(ChunkedInput(files, 4))] == [(0, 4), (1, 1), (2, 3)]


def test_the_second_row_of_an_id_is_rejected_and_names_the_first(tmp_path):
    files = [pair_file(tmp_path / "a.parquet", 3), pair_file(tmp_path / "b.parquet", 2)]
    rows = [row for _, found in ChunkedInput(files, 2).read(lambda chunk: True) for row in found]
    assert [row.record is None for row in rows] == [False] * 3 + [True] * 2
    assert rows[4].field == "pair_id" and rows[4].reason == f"pair_id must be unique; {files[0]}, row 1 has 'p1' too"


def test_a_malformed_row_tells_its_field_and_the_others_are_read(tmp_path):
    path = pair_file(tmp_path / "a.parquet", 3)
    values = pq.read_table(path).to_pylist()
    values[1]["target"] = None
    pq.write_table(pa.Table.from_pylist(values, schema=SCHEMA), path)
    rows = [row for _, found in ChunkedInput([path], 8).read(lambda chunk: True) for row in found]
    assert [row.record is None for row in rows] == [False, True, False]
    assert (rows[1].field, rows[1].pair_id) == ("target", "p1") and rows[1].reason.startswith("null; a pair needs both")


def test_the_fingerprint_changes_with_the_content(tmp_path):
    first = ChunkedInput([pair_file(tmp_path / "a.parquet", 5)], 4).fingerprint
    assert ChunkedInput([pair_file(tmp_path / "a.parquet", 5)], 4).fingerprint == first
    assert ChunkedInput([pair_file(tmp_path / "a.parquet", 6)], 4).fingerprint != first


def test_a_truncated_file_and_an_empty_one_are_named(tmp_path):
    path = pair_file(tmp_path / "a.parquet", 50)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        ChunkedInput([path], 4)
    with pytest.raises(DataError, match="no row in .*b.parquet"):
        ChunkedInput([pair_file(tmp_path / "b.parquet", 0)], 4)


def test_a_damaged_page_is_told_and_not_shown_to_the_model(tmp_path):
    path, text = tmp_path / "a.parquet", "".join(random.Random(0).choices(string.printable, k=400))
    write_pairs([replace(pair, target=Item(text=text)) for pair in pairs(1)], path)
    content = bytearray(path.read_bytes())
    place = content.find(text[100:200].encode())
    assert place > 0
    content[place] ^= 1  # a text like any other, as far as parquet can see
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read after row .*CRC"):
        read(ChunkedInput([path], 4))
