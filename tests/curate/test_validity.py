# SPDX-License-Identifier: Apache-2.0
"""The column-wise check finds the same bad rows, with the same words, as reading record by record."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.curate.records import batches
from embedrl_verl.curate.validity import bad_rows, has_media
from embedrl_verl.data.parquet import SCHEMA, scan_pairs
from embedrl_verl.errors import DataError

PATH = {"path": "a.png", "bytes": None}
BYTES = {"path": None, "bytes": b"png"}
BARE = {"path": "", "bytes": b""}
ITEM = {"text": "t", "images": None, "video": None, "kind": None, "instruction": None, "tcot": None}
VIDEO = {"frames": [PATH, BYTES], "path": None, "fps": 2.0}

ITEMS: list[Any] = [
    ITEM,
    {**ITEM, "text": "好"},
    {**ITEM, "images": [PATH, BYTES]},
    {**ITEM, "text": None, "images": [BYTES]},
    {**ITEM, "text": "", "video": VIDEO},
    {**ITEM, "video": {"frames": [], "path": "v.mp4", "fps": None}},
    {**ITEM, "kind": "page", "images": [PATH]},
    # bad ones
    None,
    {**ITEM, "text": None},
    {**ITEM, "text": "", "images": []},
    {**ITEM, "text": " \t\n\u00a0\u3000\u2028\x1c\x85"},
    {**ITEM, "kind": "page"},
    {**ITEM, "kind": "scan", "images": [PATH]},
    {**ITEM, "kind": ""},
    {**ITEM, "images": [PATH, BARE]},
    {**ITEM, "images": [None, BYTES]},
    {**ITEM, "video": {"frames": None, "path": None, "fps": None}},
    {**ITEM, "video": {"frames": [PATH], "path": "v.mp4", "fps": 1.0}},
    {**ITEM, "video": {"frames": [PATH, BARE], "path": "", "fps": 1.0}},
    *({**ITEM, "video": {**VIDEO, "fps": fps}} for fps in (0.0, -1.0, float("nan"), float("inf"))),
]


def _rows(count: int, seed: int) -> list[dict[str, Any]]:
    choose = random.Random(seed)
    rows = []
    for index in range(count):
        rows.append(
            {
                "pair_id": choose.choice([f"p{index}"] * 9 + ["", None]),
                "data_source": choose.choice(["s"] * 9 + ["", None]),
                "instruction": None,
                "query": copy.deepcopy(choose.choice(ITEMS if choose.random() < 0.3 else ITEMS[:7])),
                "target": copy.deepcopy(choose.choice(ITEMS if choose.random() < 0.3 else ITEMS[:7])),
                "target_id": None,
                "negatives": choose.choice([None, [], [ITEMS[2]], [ITEMS[0], choose.choice(ITEMS)]]),
            }
        )
    return rows


def _compare(file: Path) -> int:
    wanted = {row: str(result) for row, result in scan_pairs(file) if isinstance(result, DataError)}
    found = {}
    for first, batch in batches(file):
        found.update({first + index: str(error) for index, error in bad_rows(batch, file, first).items()})
    assert found == wanted
    return len(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_the_errors_are_those_of_reading_record_by_record(tmp_path: Path, seed: int) -> None:
    rows = _rows(500, seed)
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=70)
    assert 100 < _compare(file) < 400


@pytest.mark.parametrize("item", range(len(ITEMS)))
@pytest.mark.parametrize("place", ["query", "target", "negatives"])
def test_every_rule_on_every_side(tmp_path: Path, item: int, place: str) -> None:
    row = {"pair_id": "p", "data_source": "s", "query": ITEM, "target": ITEM, "negatives": []}
    row[place] = [ITEM, ITEMS[item]] if place == "negatives" else ITEMS[item]
    good = {"pair_id": "q", "data_source": "s", "query": ITEM, "target": ITEM, "negatives": []}
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([good, row, good], schema=SCHEMA), file)
    assert _compare(file) == (item >= 7)


def test_a_slice_of_a_batch_is_checked_like_the_batch(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(_rows(300, 9), schema=SCHEMA).combine_chunks()
    batch = table.to_batches()[0]
    whole = {index: str(error) for index, error in bad_rows(batch, "f", 0).items()}
    part = {index + 111: str(error) for index, error in bad_rows(batch.slice(111, 100), "f", 111).items()}
    assert part == {index: text for index, text in whole.items() if 111 <= index < 211}
    assert part


def test_narrow_files_with_wide_strings_are_read(tmp_path: Path) -> None:
    item = pa.struct(
        [("images", pa.large_list(pa.struct([("bytes", pa.large_binary())]))), ("text", pa.large_string())]
    )
    columns = {
        "target_id": pa.nulls(2),
        "pair_id": pa.array(["p", "q"], pa.large_string()),
        "data_source": pa.array(["s", "s"]),
        "instruction": pa.nulls(2),
        "target": pa.array([{"text": "t"}, {"text": " "}], pa.struct([("text", pa.string())])),
        "query": pa.array([{"images": [{"bytes": b"x"}]}, {"text": "t"}], item),
        "negatives": pa.array(
            [None, [{"text": "n"}, {"text": "m"}]], pa.large_list(pa.struct([("text", pa.string())]))
        ),
        "unknown": pa.array([1, 2]),
    }
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns), file)
    assert _compare(file) == 1
    ((_, batch),) = batches(file)
    assert batch.schema.equals(SCHEMA)
    assert has_media(batch["query"]).tolist() == [True, False]
    assert [item["text"] for item in batch["negatives"][1].as_py()] == ["n", "m"]
    assert batch["negatives"][0].as_py() is None
