# SPDX-License-Identifier: Apache-2.0
"""Rows by number are those of the files, whatever is cached, and none is in memory before it is asked for."""

import os
import pickle

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.table import LocatedPair, PairTable, Problem, cache_folder
from embedrl_verl.data.writer import row_of, write_pairs
from embedrl_verl.errors import DataError


def record(name, **target):
    return PairRecord(name, "s", "find", Item(text="q"), Item(**(target or {"text": name})))


@pytest.fixture
def files(tmp_path):
    """Two files of three pairs."""
    paths = [tmp_path / "a[1].parquet", tmp_path / "b.parquet"]
    write_pairs([record("a"), record("b"), record("c")], paths[0])
    write_pairs([record("d"), record("e", images=(b"bytes",)), record("f")], paths[1])
    return paths


def test_rows_are_numbered_over_all_files_and_know_where_they_are_from(files):
    table = PairTable(files)
    records = [one for file in files for one in read_pairs(file)]
    found = [table[number] for number in range(len(table))]
    assert [pair.record for pair in found] == records and list(table) == found
    assert [(pair.file, pair.row) for pair in found[2:4]] == [(str(files[0]), 2), (str(files[1]), 0)]
    assert list(table.rows([4, 0])) == [found[4], found[0]]
    assert table.column("pair_id").to_pylist() == list("abcdef")
    for number in (-1, 6):
        with pytest.raises(IndexError):
            table[number]


def test_a_table_goes_to_another_process_without_its_rows(files):
    table = pickle.loads(pickle.dumps(PairTable(files)))
    assert table[4].record.target.images == (b"bytes",)
    assert len(pickle.dumps(PairTable(files))) < 20_000


def test_a_file_that_changed_is_read_again_and_one_that_did_not_is_not(files):
    first = PairTable(files)
    assert PairTable(files).identity == first.identity
    write_pairs([record("new")], files[0])
    again = PairTable(files)
    assert again.identity != first.identity and again.column("pair_id").to_pylist() == ["new", *"def"]


def test_bad_rows_and_repeated_ids_are_named_also_from_the_cache(files, tmp_path):
    rows = pq.read_table(files[0]).to_pylist()
    rows[0]["target"], rows[2]["pair_id"] = None, "d"
    pq.write_table(pa.Table.from_pylist(rows), files[0])
    for _ in range(2):
        table = PairTable(files)
        bad, repeated = table.problems().items()
        assert bad[0] == 0 and bad[1].row == 0 and "row 0: field target: null" in bad[1].message
        assert repeated[0] == 3 and repeated[1].file == str(files[1])
        assert f"row 0, pair 'd': pair_id must be unique; {files[0]}, row 2 has it too" in repeated[1].message
        assert isinstance(table[0], Problem) and isinstance(table[1], LocatedPair)


def test_what_cannot_be_read_is_a_problem_beside_what_can(files, tmp_path):
    folder = tmp_path / "set"
    write_pairs([record("x")], folder / "part-00001.parquet")
    (folder / "part-00000.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"part-00000\.parquet: not a readable parquet file"):
        PairTable([folder])
    table, problems = PairTable.readable([tmp_path / "none.parquet", folder])
    assert table is not None and table.column("pair_id").to_pylist() == ["x"]
    assert ["no such file" in problems[0].message, "not a readable" in problems[1].message] == [True, True]


def test_pages_in_the_rows_are_not_in_memory(tmp_path):
    page = os.urandom(1 << 20)
    write_pairs((record(f"p{i}", images=(page + bytes([i]),)) for i in range(64)), tmp_path / "p.parquet")
    PairTable([tmp_path / "p.parquet"])  # copied
    before = psutil.Process().memory_full_info().uss
    table = PairTable([tmp_path / "p.parquet"])
    assert len(table) == 64 and not table.problems()
    assert psutil.Process().memory_full_info().uss - before < 16 << 20


def test_columns_that_are_not_read_are_named_every_time(files, caplog):
    pq.write_table(pq.read_table(files[0]).append_column("note", pa.array(["x"] * 3)), files[0])
    for _ in range(2):
        caplog.clear()
        PairTable(files)
        (said,) = caplog.messages
        assert str(files[0]) in said and said.endswith("not read: note")


@pytest.mark.parametrize("damage", ["cut at a message", "zeros", "empty", "no notes", "torn notes"])
def test_a_damaged_copy_is_made_again(tmp_path, damage, caplog):
    write_pairs((record(f"p{i}", images=(os.urandom(4000),)) for i in range(3000)), tmp_path / "p.parquet")
    expected = list(PairTable([tmp_path / "p.parquet"]))
    (copy,) = (path for path in cache_folder().glob("*.arrow") if len(Dataset.from_file(str(path))) == 3000)
    notes, content = copy.with_suffix(".json"), bytearray(copy.read_bytes())
    if damage == "cut at a message":
        cut = str(tmp_path / "cut")
        with pa.ipc.open_stream(copy) as whole, pa.ipc.new_stream(cut, whole.schema) as short:
            short.write_batch(whole.read_next_batch())
        copy.write_bytes((tmp_path / "cut").read_bytes())
    elif damage == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        copy.write_bytes(content)
    elif damage == "empty":
        copy.write_bytes(b"")
    else:
        notes.write_text("{") if damage == "torn notes" else notes.unlink()
    assert list(PairTable([tmp_path / "p.parquet"])) == expected
    assert "is damaged" in caplog.text
    copy.unlink()


def test_many_row_groups_are_few_batches_of_a_copy(tmp_path):
    rows = pa.Table.from_pylist([row_of(record(f"p{i}")) for i in range(200)], schema=SCHEMA)
    pq.write_table(rows, tmp_path / "p.parquet", row_group_size=2)
    table = PairTable([tmp_path / "p.parquet"])
    assert table.column("pair_id").num_chunks == 1 and table[199].record.pair_id == "p199"
