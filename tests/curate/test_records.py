# SPDX-License-Identifier: Apache-2.0
"""Streams of batches: bounded, complete, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate import records as records_module
from embedrl_verl.curate.id_job import fill_content_ids
from embedrl_verl.curate.records import PartWriter, batches, chosen_batches, rows_at, set_field, span_batches, spans
from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import DataError, ResourceError
from tests.data.test_parquet import FORMS, FULL, limited, of_another_form

MakePair = Callable[..., PairRecord]


@pytest.fixture
def file(tmp_path: Path, pair: MakePair) -> Path:
    """1,000 pairs in row groups of 100."""
    path = tmp_path / "pairs.parquet"
    contents = np.random.default_rng(0).bytes(1_000_000)
    images = [(contents[i * 1000 : (i + 1) * 1000],) for i in range(1000)]
    write_pairs([pair(f"p{i}", target=Item(text="t", images=images[i])) for i in range(1000)], tmp_path / "all")
    pq.write_table(pq.read_table(tmp_path / "all"), path, row_group_size=100)
    return path


def test_spans_cover_every_row_once_at_row_groups(file: Path) -> None:
    for wanted in (1, 250, 300, 5000):
        found = spans([file, file], wanted)
        assert [span.number for span in found] == list(range(len(found)))
        for half in (found[: len(found) // 2], found[len(found) // 2 :]):
            assert [span.start for span in half] == [0, *(span.stop for span in half[:-1])]
            assert half[-1].stop == 1000
            assert all(span.stop - span.start <= max(wanted, 100) for span in half)
        rows = [name for span in found for _, batch in span_batches(span) for name in batch["pair_id"].to_pylist()]
        assert rows == [f"p{i}" for i in range(1000)] * 2


def test_batches_are_bounded_in_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "BATCH_BYTES", 10_000)
    sizes = [batch.num_rows for _, batch in batches(file)]
    assert sum(sizes) == 1000 and max(sizes) < 100
    assert max(batch.num_rows for _, batch in batches(file, ["pair_id"])) > 100


def test_chosen_rows_come_with_their_numbers(file: Path) -> None:
    numbers = np.array([0, 99, 100, 101, 450, 999])
    found = list(chosen_batches(file, numbers))
    assert np.concatenate([rows for rows, _ in found]).tolist() == numbers.tolist()
    ids = [name for _, batch in found for name in batch["pair_id"].to_pylist()]
    assert ids == [f"p{number}" for number in numbers]
    assert list(chosen_batches(file, np.zeros(0, np.int64))) == []
    assert [batch["pair_id"].to_pylist() for batch in rows_at(file, [3, 500])] == [["p3"], ["p500"]]


def test_a_field_is_replaced_and_all_else_stays(file: Path, tmp_path: Path) -> None:
    with PartWriter(tmp_path / "out.parquet") as writer:
        for row, batch in batches(file):
            batch = set_field(batch, "query.tcot", [f"tcot {row + i}" for i in range(batch.num_rows)])
            writer.write(set_field(batch, "target_id", pa.array(["x"] * batch.num_rows)))
    for number, (new, old) in enumerate(zip(read_pairs(tmp_path / "out.parquet"), read_pairs(file), strict=True)):
        assert new == replace(old, target_id="x", query=replace(old.query, tcot=f"tcot {number}"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_type_conforms(form: str, tmp_path: Path) -> None:
    rows = [FULL, {**FULL, "pair_id": "p1", "negatives": None, "target": None}]
    schema = pa.schema([(field.name, of_another_form(field.type, FORMS[form])) for field in SCHEMA])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "f.parquet")
    ((_, batch),) = batches(tmp_path / "f.parquet")
    assert batch.schema.equals(SCHEMA)
    assert batch.equals(pa.Table.from_pylist(rows, schema=SCHEMA).to_batches()[0])


def test_columns_of_nulls_conform(tmp_path: Path) -> None:
    target = {"text": "t", "images": None, "video": None}
    table = pa.Table.from_pylist(
        [{**FULL, "target": target, "negatives": None}, {**FULL, "negatives": None, "target": None}]
    )
    pq.write_table(table, tmp_path / "f.parquet")
    ((_, batch),) = batches(tmp_path / "f.parquet")
    assert batch.schema.equals(SCHEMA) and batch["negatives"].to_pylist() == [None, None]
    assert batch["target"][0].as_py()["video"] is None and batch["target"].is_null().to_pylist() == [False, True]


def test_a_batch_over_the_limit_of_an_array_is_read_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pa.Table.from_batches([batch for _, batch in batches(file)])
    asked = limited(monkeypatch, 50_000)
    pieces = list(batches(file))
    assert pa.Table.from_batches([batch for _, batch in pieces]).equals(whole) and asked[-1] < asked[0]
    assert [row for row, _ in pieces] == np.cumsum([0, *(batch.num_rows for _, batch in pieces)])[:-1].tolist()


def test_a_null_struct_stays_null_when_a_field_is_replaced() -> None:
    table = pa.Table.from_pylist([{"pair_id": "p", "query": None}, {"pair_id": "q", "query": {"text": "t"}}], SCHEMA)
    batch = set_field(table.to_batches()[0], "query.tcot", ["a", "b"])
    assert batch["query"].is_null().to_pylist() == [True, False]
    assert batch["query"][1].as_py()["tcot"] == "b"


def test_a_part_is_whole_or_not_there(tmp_path: Path, file: Path) -> None:
    with pytest.raises(KeyError), PartWriter(tmp_path / "part.parquet") as writer:
        writer.write(next(batches(file))[1])
        raise KeyError
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]


def test_a_damaged_page_is_noticed(tmp_path: Path, file: Path) -> None:
    with PartWriter(tmp_path / "part.parquet") as writer:
        for _, batch in batches(file):
            writer.write(batch)
    content = bytearray((tmp_path / "part.parquet").read_bytes())
    (image,) = list(read_pairs(file))[500].target.images
    assert isinstance(image, bytes)
    place = content.find(image[100:200])
    assert place > 0
    content[place] ^= 1  # an image like any other, as far as parquet can see
    (tmp_path / "part.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"part\.parquet: not a readable parquet file \(.*CRC"):
        list(batches(tmp_path / "part.parquet"))


def test_a_full_disk_is_told_and_the_job_goes_on_later(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def publish(temporary: Path, target: Path) -> None:
        if target.name == "part-00004.parquet" and len(written) < 5:
            written.append(None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(target.name)
        os.replace(temporary, target)

    monkeypatch.setattr(records_module, "publish", publish)
    with pytest.raises(ResourceError, match=r"the disk is full; what is finished is kept"):
        fill_content_ids([file], tmp_path / "out", workers=1, rows_per_part=100)
    assert written == [*(f"part-0000{i}.parquet" for i in range(4)), None]
    report = fill_content_ids([file], tmp_path / "out", workers=1, rows_per_part=100)
    assert report.sources["s"].pairs == 1000
    assert written[5:] == [f"part-0000{i}.parquet" for i in range(4, 10)]
    assert not list((tmp_path / "out").glob(".*"))


def test_curation_imports_neither_torch_nor_verl_nor_ray() -> None:
    code = "import sys, embedrl_verl.curate.id_job, embedrl_verl.curate.split_job; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pyarrow" in loaded
    assert not {"torch", "verl", "ray", "transformers"} & set(loaded)
