# SPDX-License-Identifier: Apache-2.0
"""Pair records in parquet: one row a pair.

| column | type |
|---|---|
| pair_id, data_source, instruction | string |
| query_id, target_id (optional) | string |
| query, target | struct {text, kind, instruction, tcot: string, images: list<media>, video: video} |
| negatives (optional) | list of the same struct |

media = struct {path: string, bytes: binary}; video = struct {frames: list<media>, path: string, fps: double}. Null
means empty everywhere, and of a struct only the fields that are used need to exist. A media struct with bytes is
those bytes (its path is then only a name, as in files written by `datasets`). Other columns are not read. Arrow's
other forms of a type (large, view, dictionary, as of pandas' categories) are the type.

Rows are counted from 0 over the whole file. `PairTable` (data/table.py) reads the same files memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedrl_verl.data.schema import Item, Media, PairRecord, Video
from embedrl_verl.errors import DataError

MEDIA = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
VIDEO = pa.struct([("frames", pa.list_(MEDIA)), ("path", pa.string()), ("fps", pa.float64())])
ITEM = pa.struct(
    [
        ("text", pa.string()),
        ("images", pa.list_(MEDIA)),
        ("video", VIDEO),
        ("kind", pa.string()),
        ("instruction", pa.string()),
        ("tcot", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("data_source", pa.string()),
        ("instruction", pa.string()),
        ("query", ITEM),
        ("target", ITEM),
        ("query_id", pa.string()),
        ("target_id", pa.string()),
        ("negatives", pa.list_(ITEM)),
    ]
)
OPTIONAL_COLUMNS = ("query_id", "target_id", "negatives")
ROWS_PER_BATCH, BYTES_PER_BATCH = 1024, 32 << 20

READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class Span:
    """Whole row groups of a file that follow each other, the unit of a job.

    Attributes:
        file: parquet file of pair records.
        groups: row groups, first and one past the last.
        start, stop: rows of the file, from 0.
    """

    file: Path
    groups: tuple[int, int]
    start: int
    stop: int


def spans(files: Sequence[Path], rows: int) -> list[Span]:
    """Files cut into spans of about `rows` rows, in order. Reads the files' footers only; raises DataError."""
    found: list[Span] = []
    for path in files:
        with opened(path) as file:
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        first, start, stop = 0, 0, 0
        for index, size in enumerate(sizes):
            if stop > start and stop + size - start > rows:
                found.append(Span(path, (first, index), start, stop))
                first, start = index, stop
            stop += size
        if stop > start:
            found.append(Span(path, (first, len(sizes)), start, stop))
    return found


def read_batches(
    source: Span | str | Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches in `SCHEMA`, bounded in rows and bytes, each with the row of the file at which it begins.

    Args:
        source: a span, or a whole file.
        columns: of `SCHEMA`, to read; None for all. What a file lacks comes out as null.

    Raises:
        DataError: the file cannot be read, or does not hold pair records.
    """
    path = source.file if isinstance(source, Span) else Path(source)
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    with opened(path) as file:
        row, groups = (source.start, range(*source.groups)) if isinstance(source, Span) else (0, None)
        present = [name for name in schema.names if name in file.schema_arrow.names]
        try:
            for batch in bounded(file, range(file.num_row_groups) if groups is None else groups, present):
                batch.validate(full=True)  # strings are UTF-8
                yield row, conform(batch, schema)
                row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read after row {row} ({error})") from error


def read_rows(
    path: str | Path, numbers: npt.NDArray[np.int64], columns: Sequence[str] | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Batches of some rows of a file (ascending, from 0) with their numbers; row groups without any are not read."""
    for group in spans([Path(path)], 1) if len(numbers) else ():
        low, high = np.searchsorted(numbers, [group.start, group.stop])
        for row, batch in read_batches(group, columns) if low < high else ():
            low, high = np.searchsorted(numbers, [row, row + batch.num_rows])
            if low < high:
                yield numbers[low:high], batch.take(pa.array(numbers[low:high] - row))


def read_pairs(path: str | Path) -> Iterator[PairRecord]:
    """The records of a file, in order, read in small batches. Raises DataError at the first row that is none."""
    for _, record in scan_pairs(path):
        if isinstance(record, DataError):
            raise record
        yield record


def scan_pairs(source: Span | str | Path) -> Iterator[tuple[int, PairRecord | DataError]]:
    """Every row number (from 0) with its record, or with the error that says why it is none."""
    return ((row, found) for row, _, found in scan_rows(source))


def scan_rows(source: Span | str | Path) -> Iterator[tuple[int, dict[str, Any], PairRecord | DataError]]:
    """`scan_pairs` with the plain values of each row between."""
    path = source.file if isinstance(source, Span) else source
    for first, batch in read_batches(source):
        for row, values in enumerate(batch.to_pylist(), first):
            yield row, values, record_or_error(values, path, row)


class opened:
    """Context manager: a parquet file of pair records, read through a small buffer; damaged pages are noticed if they
    have checksums. Raises DataError, naming the file, for what cannot be read or holds no pair records."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> pq.ParquetFile:
        try:
            self._file = pq.ParquetFile(
                self._path, pre_buffer=False, buffer_size=READ_BUFFER, page_checksum_verification=True
            )
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._path}: not a readable parquet file ({error})") from error
        check_schema(self._file.schema_arrow, self._path)
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def conform(batch: pa.RecordBatch, schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    """The batch in exactly this schema: missing columns and fields null, other forms of a type cast.

    `datasets.table.table_cast` does the same but for views of lists.
    """
    if batch.schema.equals(schema):
        return batch
    names = batch.schema.names
    columns = [
        _fit(batch[field.name], field.type) if field.name in names else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _fit(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type.equals(kind):
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_struct(kind) and pa.types.is_struct(array.type):
        known = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
        children = [
            _fit(known[field.name], field.type) if field.name in known else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_list(kind):
        return with_values(array, _fit(pc.list_flatten(array), kind.value_type), kind)
    return array.cast(kind)


def with_values(lists: pa.Array, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    """Lists as long as these, null where these are, of other values.

    Args:
        lists: list array of any form.
        values: one for each of `pc.list_flatten(lists)`.
        kind: type of the result, a list.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, type=kind, mask=lists.is_null())


def bounded(
    file: pq.ParquetFile, groups: Iterable[int], columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Row groups in batches of bounded rows and bytes; a batch over several groups of large media would hold all of
    them."""
    for group in groups:
        facts = file.metadata.row_group(group)
        parts = (facts.column(index) for index in range(facts.num_columns))
        read = (part for part in parts if columns is None or part.path_in_schema.partition(".")[0] in columns)
        size = sum(part.total_uncompressed_size for part in read)
        rows = max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH * facts.num_rows // max(size, 1)))
        yield from in_pieces(file, rows, row_groups=[group], columns=columns, use_threads=False)


def in_pieces(file: pq.ParquetFile, rows: int, **options: Any) -> Iterator[pa.RecordBatch]:
    """`file.iter_batches(rows, **options)`, in smaller ones from where one would not fit: an Arrow array holds 2 GiB.

    The footer does not tell: a value that a group's dictionary holds once counts once there.
    """
    done = 0
    while True:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=rows, **options):
                new = max(done - row, 0)
                row += batch.num_rows
                if new < batch.num_rows:
                    done = row
                    yield batch.slice(new)
            return
        except (pa.ArrowNotImplementedError, pa.ArrowCapacityError):
            if rows == 1:
                raise
            rows //= 2


def check_schema(found: pa.Schema, path: str | Path) -> None:
    """Raise DataError, naming file and field, if a file of this schema does not hold pair records."""
    for field in SCHEMA:
        if field.name in found.names:
            _check_type(found.field(field.name).type, field.type, f"{path}, field {field.name}")
        elif field.name not in OPTIONAL_COLUMNS:
            raise DataError(f"{path}: column {field.name!r} is missing; the file has {', '.join(found.names)}")


def _check_type(found: pa.DataType, wanted: pa.DataType, where: str) -> None:
    """Recursive check; an all-null column passes, and so does any form in which Arrow keeps the type."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return
    if pa.types.is_struct(wanted):
        if not pa.types.is_struct(found):
            raise DataError(f"{where}: must be a struct; got {found}")
        names = [field.name for field in wanted]
        for field in found:
            if field.name not in names:
                raise DataError(f"{where}.{field.name}: unknown field; known are {', '.join(names)}")
            _check_type(field.type, wanted.field(field.name).type, f"{where}.{field.name}")
        return
    if pa.types.is_list(wanted):
        if not is_list(found):
            raise DataError(f"{where}: must be a list; got {found}")
        _check_type(found.value_type, wanted.value_type, f"{where}[]")
        return
    accepted: dict[pa.DataType, tuple[Callable[[pa.DataType], bool], ...]] = {
        pa.string(): (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        pa.binary(): (
            *(pa.types.is_binary, pa.types.is_large_binary),
            *(pa.types.is_binary_view, pa.types.is_fixed_size_binary),
        ),
        pa.float64(): (pa.types.is_floating, pa.types.is_integer),
    }
    if not any(test(found) for test in accepted[wanted]):
        raise DataError(f"{where}: must be {wanted}; got {found}")


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, in whatever form Arrow keeps them."""
    types = pa.types
    forms = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in forms)


def record_or_error(values: Mapping[str, Any], path: str | Path, row: int) -> PairRecord | DataError:
    """A row's plain values as a record, or the error that names file, row (from 0) and field."""
    try:
        return _record(values)
    except DataError as error:
        return DataError(f"{path}, row {row}: {error}")


def _record(values: Mapping[str, Any]) -> PairRecord:
    for side, other in (("query", "target"), ("target", "query")):
        if values[side] is None:
            raise DataError(f"field {side}: null; a pair needs both sides, and this {other} has no partner")
    return PairRecord(
        pair_id=values["pair_id"] or "",
        data_source=values["data_source"] or "",
        instruction=values["instruction"] or "",
        query=_item(values["query"], "query"),
        target=_item(values["target"], "target"),
        target_id=values.get("target_id") or "",
        negatives=tuple(_item(item, f"negatives[{i}]") for i, item in enumerate(values.get("negatives") or ())),
        query_id=values.get("query_id") or "",
    )


def _item(values: dict[str, Any] | None, field: str) -> Item:
    if values is None:
        raise DataError(f"field {field}: null")
    video = values.get("video")
    try:
        return Item(
            text=values.get("text") or "",
            images=_media_list(values.get("images"), f"{field}.images"),
            video=None if video is None else _video(video, f"{field}.video"),
            instruction=values.get("instruction") or "",
            kind=values.get("kind"),
            tcot=values.get("tcot") or "",
        )
    except DataError as error:
        raise _in_field(error, field) from error


def _video(values: dict[str, Any], field: str) -> Video:
    frames = _media_list(values.get("frames"), f"{field}.frames")
    fps = values.get("fps")
    try:
        return Video(frames=frames, path=values.get("path"), fps=None if fps is None else float(fps))
    except DataError as error:
        raise _in_field(error, field) from error


def _in_field(error: DataError, field: str) -> DataError:
    """The error with the name of its field, once."""
    return error if str(error).startswith("field ") else DataError(f"field {field}: {error}")


def _media_list(values: list[dict[str, Any] | None] | None, field: str) -> tuple[Media, ...]:
    media: list[Media] = []
    for index, value in enumerate(values or ()):
        reference = value and (value.get("bytes") or value.get("path"))
        if not reference:
            raise DataError(f"field {field}[{index}]: must have a path or bytes; both are empty")
        media.append(reference)
    return tuple(media)
