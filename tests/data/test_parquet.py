# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data.parquet import OPTIONAL_COLUMNS, SCHEMA, read_pairs, scan_pairs, write_pairs
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import DataError

ROW = {
    "pair_id": "p0",
    "data_source": "s",
    "instruction": "Find it.",
    "query": {"text": "q"},
    "target": {"text": "t", "images": [{"path": "a.png"}]},
    "target_id": "",
    "negatives": [{"text": "n"}],
}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """Rows with the types that pyarrow infers, as a user's own script would write them."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_records_survive_the_round_trip(tmp_path: Path) -> None:
    clip = Video(frames=("0.png", b"\x89PNG", "2.png"), fps=2.0)
    records = [
        PairRecord("p0", "s", "Find it.", Item(text="q", instruction="own"), Item(text="t"), "id", query_id="photo 1"),
        PairRecord("p1", "s", "", Item(images=("a.png", b"xyz"), kind="page"), Item(video=clip), ""),
        PairRecord(
            "p2", "s", "", Item(text="q"), Item(video=Video(path="c.mp4")), "", (Item(text="n"), Item(text="m"))
        ),
    ]
    write_pairs(iter(records * 200), tmp_path / "new" / "pairs.parquet")
    assert list(read_pairs(tmp_path / "new" / "pairs.parquet")) == records * 200


def test_a_users_own_file_needs_only_what_it_uses(tmp_path: Path) -> None:
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", {**ROW, "note": "ignored", "target_id": None}))
    target = Item(text="t", images=("a.png",))
    assert record == PairRecord("p0", "s", "Find it.", Item(text="q"), target, "", (Item(text="n"),))


def test_bytes_win_over_the_name_beside_them(tmp_path: Path) -> None:
    row = {**ROW, "query": {"images": [{"bytes": b"png", "path": "name.png"}]}}
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", row))
    assert record.query.images == (b"png",)


@pytest.mark.parametrize("column", [name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS])
def test_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write_rows(tmp_path / "f.parquet", {name: value for name, value in ROW.items() if name != column})
    with pytest.raises(DataError, match=rf"f\.parquet: column '{column}' is missing; the file has "):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_id": 3}, "field pair_id: must be string; got int64"),
        ({"query_id": 3}, "field query_id: must be string; got int64"),
        ({"query": "q"}, "field query: must be a struct; got string"),
        ({"query": {"text": 1.5}}, "field query.text: must be string; got double"),
        ({"query": {"text": "q", "image": "a.png"}}, "field query.image: unknown field; known are text, images"),
        ({"query": {"images": "a.png"}}, "field query.images: must be a list; got string"),
        ({"query": {"images": ["a.png"]}}, r"field query.images\[\]: must be a struct; got string"),
        (
            {"target": {"video": {"frames": [{"bytes": "x"}]}}},
            r"field target.video.frames\[\].bytes: must be binary; got string",
        ),
        ({"target": {"video": {"path": "a", "fps": "2"}}}, "field target.video.fps: must be double; got string"),
        ({"negatives": {"text": "n"}}, "field negatives: must be a list"),
    ],
)
def test_wrong_type_names_file_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "f.parquet", {**ROW, **change})
    with pytest.raises(DataError, match=rf"f\.parquet, {message}"):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_id": None}, "pair_id must not be empty"),
        ({"target": None}, "field target: null; a pair needs both sides, and this query has no partner"),
        ({"query": None}, "field query: null; a pair needs both sides, and this target has no partner"),
        ({"query": {"text": " "}}, "query must have text, images or a video"),
        ({"query": {"text": "q", "kind": "photo"}}, "field query: kind must be null or 'page'; got 'photo'"),
        ({"target": {"images": [{"path": ""}]}}, r"field target.images\[0\]: must have a path or bytes"),
        ({"target": {"video": {"frames": [], "path": None}}}, "field target.video: video must have exactly one"),
        ({"target": {"video": {"path": "a", "fps": -1.0}}}, "field target.video: video.fps must be a positive number"),
        ({"negatives": [{"text": "n"}, None]}, r"field negatives\[1\]: null"),
    ],
)
def test_bad_row_names_file_row_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "f.parquet", ROW, {**ROW, "pair_id": "p1", **change}, {**ROW, "pair_id": "p2"})
    with pytest.raises(DataError, match=rf"f\.parquet, row 1: {message}"):
        list(read_pairs(path))
    found = list(scan_pairs(path))
    assert [(row, isinstance(record, DataError)) for row, record in found] == [(0, False), (1, True), (2, False)]


def test_row_numbers_go_on_over_batches(tmp_path: Path) -> None:
    rows = [{**ROW, "pair_id": f"p{index}"} for index in range(600)]
    rows[555]["pair_id"] = ""
    with pytest.raises(DataError, match="row 555: pair_id must not be empty"):
        list(read_pairs(write_rows(tmp_path / "f.parquet", *rows)))


def test_file_that_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f.parquet").write_text("pair_id,query")
    for name in ("f.parquet", "gone.parquet"):
        with pytest.raises(DataError, match=rf"{name}: not a readable parquet file"):
            list(read_pairs(tmp_path / name))


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "f.parquet", ROW)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_pairs(path))


@pytest.mark.parametrize("ids", [{}, {"target_id": "t"}, {"query_id": None}, {"query_id": "photo", "target_id": "t"}])
def test_a_file_needs_no_column_of_ids(tmp_path: Path, ids: dict[str, Any]) -> None:
    bare = {name: value for name, value in ROW.items() if name != "target_id"}
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", {**bare, **ids}))
    assert (record.query_id, record.target_id) == (ids.get("query_id") or "", ids.get("target_id") or "")
    write_pairs([record], tmp_path / "again.parquet")
    assert list(read_pairs(tmp_path / "again.parquet")) == [record]
