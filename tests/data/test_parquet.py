# SPDX-License-Identifier: Apache-2.0
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data import parquet
from embedrl_verl.data.parquet import OPTIONAL_COLUMNS, SCHEMA, read_pairs, scan_pairs
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
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


def write_rows(path, *rows):
    """Rows with the types that pyarrow infers, as a user's own script would write them."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_records_survive_the_round_trip(tmp_path):
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


def test_a_users_own_file_needs_only_what_it_uses(tmp_path):
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", {**ROW, "note": "ignored", "target_id": None}))
    target = Item(text="t", images=("a.png",))
    assert record == PairRecord("p0", "s", "Find it.", Item(text="q"), target, "", (Item(text="n"),))


def test_bytes_win_over_the_name_beside_them(tmp_path):
    row = {**ROW, "query": {"images": [{"bytes": b"png", "path": "name.png"}]}}
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", row))
    assert record.query.images == (b"png",)


def test_missing_column_is_named(tmp_path):
    for column in (name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS):
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
def test_wrong_type_names_file_and_field(tmp_path, change, message):
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
def test_bad_row_names_file_row_and_field(tmp_path, change, message):
    path = write_rows(tmp_path / "f.parquet", ROW, {**ROW, "pair_id": "p1", **change}, {**ROW, "pair_id": "p2"})
    with pytest.raises(DataError, match=rf"f\.parquet, row 1: {message}"):
        list(read_pairs(path))
    found = list(scan_pairs(path))
    assert [(row, isinstance(record, DataError)) for row, record in found] == [(0, False), (1, True), (2, False)]


FULL = {
    "pair_id": "p0",
    "data_source": "s",
    "instruction": "i",
    "query": {
        "text": "q",
        "images": [{"path": "a.png", "bytes": None}, {"path": None, "bytes": b"png"}],
        "video": {"frames": [{"path": None, "bytes": b"jpg"}], "path": None, "fps": 2.0},
        "kind": None,
        "instruction": "own",
        "tcot": "t",
    },
    "target": {"text": "t"},
    "target_id": "",
    "negatives": [{"text": "n", "images": [{"path": "b.png", "bytes": None}]}],
}


def of_another_form(kind, form):
    """The type with every part replaced for which `form` has another, at every depth."""
    if pa.types.is_struct(kind):
        kind = pa.struct([(field.name, of_another_form(field.type, form)) for field in kind])
    elif pa.types.is_list(kind) and form is not VIEW:  # pyarrow cannot write views in lists
        kind = pa.list_(of_another_form(kind.value_type, form))
    return form(kind) or kind


def word(to, data):
    return lambda kind: {pa.string(): to, pa.binary(): data}.get(kind)


VIEW = word(pa.string_view(), pa.binary_view())
FORMS: dict[str, Callable[[pa.DataType], pa.DataType | None]] = {
    "plain": lambda kind: None,
    "dictionary": word(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.binary())),
    "small dictionary": word(pa.dictionary(pa.int8(), pa.large_string()), pa.binary()),
    "large": word(pa.large_string(), pa.large_binary()),
    "view": VIEW,
    "list view": lambda kind: pa.list_view(kind.value_type) if pa.types.is_list(kind) else None,
    "large list": lambda kind: pa.large_list(kind.value_type) if pa.types.is_list(kind) else None,
    "large list view": lambda kind: pa.large_list_view(kind.value_type) if pa.types.is_list(kind) else None,
    "half": lambda kind: pa.float32() if pa.types.is_floating(kind) else None,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_which_arrow_keeps_a_type_is_read_alike(tmp_path, form):
    schema = pa.schema([(field.name, of_another_form(field.type, FORMS[form])) for field in SCHEMA])
    assert (form == "plain") == schema.equals(SCHEMA)
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist([FULL, {**FULL, "pair_id": "p1", "negatives": None}], schema=schema), path)
    first, second = read_pairs(path)
    assert first.query.images == ("a.png", b"png") and first.query.instruction == "own"
    assert first.query.video == Video(frames=(b"jpg",), fps=2.0)
    assert first.negatives == (Item(text="n", images=("b.png",)),) and second == replace(
        first, pair_id="p1", negatives=()
    )


def test_a_category_of_numbers_is_no_text(tmp_path):
    table = pa.Table.from_pylist([ROW]).set_column(0, "pair_id", pa.array([3]).dictionary_encode())
    pq.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"f\.parquet, field pair_id: must be string; got int64"):
        list(read_pairs(tmp_path / "f.parquet"))


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_null_structs_lists_and_words_are_empty_at_every_depth(tmp_path, schema):
    nulls = dict.fromkeys(("images", "video", "kind", "instruction", "tcot"))
    row = {**ROW, "target_id": None, "query": {"text": "q", **nulls}, "target": {"text": "t", **nulls}}
    table = pa.Table.from_pylist([{**row, "negatives": None}, {**row, "negatives": []}], schema=schema)
    pq.write_table(table, tmp_path / "f.parquet")
    for record in read_pairs(tmp_path / "f.parquet"):
        assert record == PairRecord("p0", "s", "Find it.", Item(text="q"), Item(text="t"), "")


@pytest.mark.parametrize("form", FORMS)
def test_a_null_where_a_value_must_be_names_row_and_field_in_every_form(tmp_path, form):
    image = {"path": None, "bytes": None}
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"query": None}, "field query: null"),
        ({"negatives": [None]}, r"field negatives[0]: null"),
        ({"target": {"images": [{"path": "a.png"}, None]}}, "field target.images[1]: must have a path or bytes"),
        ({"target": {"images": [image]}}, "field target.images[0]: must have a path or bytes"),
        ({"target": {"video": {"frames": None}}}, "field target.video: video must have exactly one"),
    )
    schema = pa.schema([(field.name, of_another_form(field.type, FORMS[form])) for field in SCHEMA])
    rows = [FULL, *({**FULL, **change} for change, _ in changes)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "f.parquet")
    found = [str(record) for _, record in scan_pairs(tmp_path / "f.parquet")][1:]
    for number, ((_, message), error) in enumerate(zip(changes, found, strict=True)):
        assert f"f.parquet, row {number + 1}: {message}" in error


def limited(monkeypatch, most):
    """pyarrow as it is with arrays of `most` bytes and no more; the sizes of batches it was asked for."""
    asked: list[int] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, **options):
        asked.append(batch_size)
        for batch in real(self, batch_size=batch_size, **options):
            if batch.nbytes > most:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return asked


@pytest.mark.parametrize("sizes", [[100] * 50, [1] * 30 + [30_000, 1, 30_000] + [1] * 20, [30_000] * 5])
def test_a_row_group_over_the_limit_of_an_array_is_read_in_pieces(tmp_path, monkeypatch, sizes):
    rows = [{**FULL, "pair_id": f"p{i}", "target": {"images": [{"bytes": b"x" * n}]}} for i, n in enumerate(sizes)]
    rows[-1]["pair_id"] = ""
    path = write_rows(tmp_path / "f.parquet", *rows)
    expected = list(scan_pairs(path))[:-1]
    asked = limited(monkeypatch, 31_000)
    monkeypatch.setattr(parquet, "ROWS_PER_BATCH", 16)  # some are read before one does not fit
    *found, (number, bad) = scan_pairs(path)
    assert found == expected and [row for row, _ in found] == list(range(len(sizes) - 1))
    assert number == len(sizes) - 1 and f"row {number}: pair_id" in str(bad)
    assert asked == {50: [16], 53: [16, 8], 5: [16, 8, 4, 2, 1]}[len(sizes)]


def test_a_row_that_no_array_holds_is_named(tmp_path, monkeypatch):
    rows = [{**FULL, "target": {"images": [{"bytes": b"x" * n}]}} for n in (10, 10, 40_000, 10)]
    path = write_rows(tmp_path / "f.parquet", *rows)
    limited(monkeypatch, 33_000)
    with pytest.raises(DataError, match=r"f\.parquet: cannot be read after row 2 \(Nested"):
        list(scan_pairs(path))


def test_batches_are_bounded_in_bytes(tmp_path, monkeypatch):
    draw = random.Random(0)
    rows = [{**FULL, "target": {"images": [{"bytes": draw.randbytes(1000)}]}} for _ in range(40)]
    path = write_rows(tmp_path / "f.parquet", *rows)
    asked = limited(monkeypatch, 1 << 30)
    monkeypatch.setattr(parquet, "BYTES_PER_BATCH", 10_000)
    assert len(list(read_pairs(path))) == 40 and len(asked) == 1 and 1 <= asked[0] < 10


def test_row_numbers_go_on_over_batches(tmp_path):
    rows = [{**ROW, "pair_id": f"p{index}"} for index in range(600)]
    rows[555]["pair_id"] = ""
    with pytest.raises(DataError, match="row 555: pair_id must not be empty"):
        list(read_pairs(write_rows(tmp_path / "f.parquet", *rows)))


def test_what_is_no_parquet_is_an_error(tmp_path):
    (tmp_path / "text.parquet").write_text("pair_id,query")
    path = write_rows(tmp_path / "torn.parquet", ROW)
    path.write_bytes(path.read_bytes()[:-20])
    for name in ("text.parquet", "torn.parquet", "gone.parquet"):
        with pytest.raises(DataError, match=rf"{name}: not a readable parquet file"):
            list(read_pairs(tmp_path / name))


@pytest.mark.parametrize("ids", [{}, {"target_id": "t"}, {"query_id": None}, {"query_id": "photo", "target_id": "t"}])
def test_a_file_needs_no_column_of_ids(tmp_path, ids):
    bare = {name: value for name, value in ROW.items() if name != "target_id"}
    (record,) = read_pairs(write_rows(tmp_path / "f.parquet", {**bare, **ids}))
    assert (record.query_id, record.target_id) == (ids.get("query_id") or "", ids.get("target_id") or "")
    write_pairs([record], tmp_path / "again.parquet")
    assert list(read_pairs(tmp_path / "again.parquet")) == [record]


def test_a_record_that_cannot_be_written_leaves_the_file_that_was_there(tmp_path, pair):
    path = tmp_path / "pairs.parquet"
    write_pairs([pair("a"), pair("b")], path)

    def broken():
        yield from (pair(str(number)) for number in range(3000))
        raise RuntimeError("the source has ended")

    with pytest.raises(RuntimeError, match="the source has ended"):
        write_pairs(broken(), path)
    assert [record.pair_id for record in read_pairs(path)] == ["a", "b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.parquet"]


def in_groups(tmp_path, pair, rows=1000, size=100):
    write_pairs([pair(f"p{i}") for i in range(rows)], tmp_path / "all.parquet")
    pq.write_table(pq.read_table(tmp_path / "all.parquet"), tmp_path / "groups.parquet", row_group_size=size)
    return tmp_path / "groups.parquet"


def test_spans_cover_every_row_once_at_row_groups(tmp_path, pair):
    file = in_groups(tmp_path, pair)
    for wanted in (1, 250, 300, 5000):
        found = parquet.spans([file, file], wanted)
        for half in (found[: len(found) // 2], found[len(found) // 2 :]):
            assert [span.start for span in half] == [0, *(span.stop for span in half[:-1])] and half[-1].stop == 1000
            assert all(span.stop - span.start <= max(wanted, 100) for span in half)
        rows = [
            name for span in found for _, batch in parquet.read_batches(span) for name in batch["pair_id"].to_pylist()
        ]
        assert rows == [f"p{i}" for i in range(1000)] * 2


def test_rows_by_number_come_with_their_numbers(tmp_path, pair):
    file, numbers = in_groups(tmp_path, pair), np.array([0, 99, 100, 101, 450, 999])
    found = list(parquet.read_rows(file, numbers))
    assert np.concatenate([rows for rows, _ in found]).tolist() == numbers.tolist()
    assert [name for _, batch in found for name in batch["pair_id"].to_pylist()] == [f"p{number}" for number in numbers]
    assert list(parquet.read_rows(file, np.zeros(0, np.int64))) == []
