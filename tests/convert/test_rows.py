# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert import rows as rows_module
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.inputs import LocalRoot, RemoteRoot, Root
from embedrl_verl.convert.rows import ANCHOR_EVERY, FileSurvey, read_rows, survey
from embedrl_verl.errors import DataError, ResourceError
from tests.data.test_parquet import limited


def read(root: Root, name: str, wanted: Any = None) -> list[tuple[int, Any]]:
    """Rows as they are read; errors as their text."""
    facts = survey(root, name)
    wanted = np.arange(facts.rows) if wanted is None else np.array(wanted, np.int64)
    anchor = facts.anchor(int(wanted[0])) if len(wanted) else (0, 0)
    found = read_rows(root, name, wanted, anchor)
    return [(row, str(values) if isinstance(values, RowError) else values) for row, values in found]


def table(count: int) -> pa.Table:
    return pa.table({"n": list(range(count)), "text": [f"row {index} " + "x" * 50 for index in range(count)]})


def write_all_forms(folder: Path, count: int) -> None:
    lines = [json.dumps(row) + "\n" for row in table(count).to_pylist()]
    (folder / "a.jsonl").write_text("".join(lines))
    with gzip.open(folder / "b.jsonl.gz", "wt") as packed:
        packed.writelines(lines)
    pq.write_table(table(count), folder / "c.parquet", row_group_size=700)
    with pa.OSFile(str(folder / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table(1).schema) as stream:
        stream.write_table(table(count), max_chunksize=500)
    with pa.OSFile(str(folder / "data-1.arrow"), "wb") as sink, pa.ipc.new_file(sink, table(1).schema) as file:
        file.write_table(table(count), max_chunksize=500)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet", "data-0.arrow", "data-1.arrow"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_kind_of_file_gives_the_wanted_rows_from_any_start(tmp_path: Path, name: str, remote: bool) -> None:
    count = 3 * ANCHOR_EVERY + 5
    write_all_forms(tmp_path, count)
    root: Root = RemoteRoot("file", str(tmp_path), "hub") if remote else LocalRoot(tmp_path)
    expected = list(enumerate(table(count).to_pylist()))
    assert survey(root, name).rows == count
    assert read(root, name) == expected
    for wanted in ([0], [ANCHOR_EVERY], [count - 1], [3, 699, 700, 2048, 2500], range(1000, 1100)):
        assert read(root, name, wanted) == [expected[row] for row in wanted]


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"n": 0}', b"{broken", b"[1]", b'{"t": "\xff"}', b"", b"  ", b'{"n": 6}', b'{"torn": ']
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    found = dict(read(LocalRoot(tmp_path), "f.jsonl"))
    assert sorted(found) == [0, 1, 2, 3, 6, 7]  # blank lines are passed over, and count
    assert (found[0], found[6]) == ({"n": 0}, {"n": 6})
    assert found[1].startswith("the line is not JSON")
    assert "truncated" not in found[1]
    assert found[2] == "a line must be a JSON object; got [1] (list)"
    assert found[3].startswith("the line is not UTF-8")
    assert found[7].endswith("the file may be truncated")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE", 1000)
    (tmp_path / "f.jsonl").write_bytes(b'{"n": 0}\n{"n": "' + b"x" * 5000 + b'"}\n{"n": 2}\n')
    sizes: list[int] = []

    class Watched(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            sizes.append(-1 if size is None else size)
            return super().readline(size)

    root = LocalRoot(tmp_path)
    monkeypatch.setattr(root, "open", lambda name: Watched((tmp_path / name).read_bytes()))
    found = read(root, "f.jsonl")
    assert sizes and set(sizes) == {1000}
    assert found[1] == (1, "the line is over the limit of 1000 bytes; write one object a line")
    assert [row for row, _ in found] == [0, 1, 2]
    assert found[2] == (2, {"n": 2})


def test_deep_nesting_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"n": ' + "[" * 100_000 + "\n")
    assert "the line is not JSON" in read(LocalRoot(tmp_path), "f.jsonl")[0][1]


def test_a_truncated_parquet_file_is_a_fault_of_the_file(tmp_path: Path) -> None:
    write_all_forms(tmp_path, 100)
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-20])
    facts = survey(LocalRoot(tmp_path), "c.parquet")
    assert facts.rows == 0
    assert facts.fault.startswith("not a readable parquet file (")
    (tmp_path / "c.parquet").write_bytes(b"")
    assert survey(LocalRoot(tmp_path), "c.parquet").fault


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    pq.write_table(table(900), tmp_path / "f.parquet", row_group_size=300, use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "f.parquet").metadata.row_group(1).column(1)
    content = bytearray((tmp_path / "f.parquet").read_bytes())
    start = column.data_page_offset + column.total_compressed_size // 2
    content[start : start + 40] = bytes(40)
    (tmp_path / "f.parquet").write_bytes(content)
    found = read(LocalRoot(tmp_path), "f.parquet")
    assert [row for row, _ in found] == list(range(900))
    bad = [row for row, values in found if isinstance(values, str)]
    assert bad == list(range(300, 600))
    assert found[300][1].startswith("row group 1 cannot be read")


def test_a_row_group_over_the_limit_of_an_array_costs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 600
    write_all_forms(tmp_path, count)
    asked = limited(monkeypatch, 2000)
    assert read(LocalRoot(tmp_path), "c.parquet") == list(enumerate(table(count).to_pylist()))
    assert read(LocalRoot(tmp_path), "c.parquet", [0, 599]) == [
        (row, table(count).to_pylist()[row]) for row in (0, 599)
    ]
    assert 1 <= asked[-1] < asked[0]


def test_a_string_column_that_is_no_unicode_costs_one_row(tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"t": values}), tmp_path / "f.parquet")
    found = read(LocalRoot(tmp_path), "f.parquet")
    assert [found[0], found[2]] == [(0, {"t": "good"}), (2, {"t": "fine"})]
    assert found[1][1].startswith("field t: a string must be UTF-8")


@pytest.mark.parametrize(("name", "share"), [("b.jsonl.gz", 0.6), ("data-0.arrow", 0.6)])
def test_a_file_that_ends_early_keeps_the_rows_before(tmp_path: Path, name: str, share: float) -> None:
    write_all_forms(tmp_path, 3000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    root = LocalRoot(tmp_path)
    facts = survey(root, name)
    assert 0 < facts.rows < 3000
    assert "ends early" in facts.fault
    assert read(root, name) == list(enumerate(table(3000).to_pylist()))[: facts.rows]


def test_a_file_that_vanishes_while_it_is_read_gives_bad_rows_but_a_hub_stops(tmp_path: Path) -> None:
    wanted = np.arange(3)
    (message,) = {str(values) for _, values in read_rows(LocalRoot(tmp_path), "gone.jsonl", wanted)}
    assert message.startswith("the file cannot be read here")
    with pytest.raises(ResourceError, match=r"gone\.jsonl cannot be read .* run the command again"):
        list(read_rows(RemoteRoot("file", str(tmp_path), "hub"), "gone.jsonl", wanted))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"f\.csv: unknown kind of file; known are \.parquet, \.jsonl"):
        survey(LocalRoot(tmp_path), "f.csv")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b"")
    assert survey(LocalRoot(tmp_path), "f.jsonl").rows == 0
    assert FileSurvey(5).anchor(3) == (0, 0)
