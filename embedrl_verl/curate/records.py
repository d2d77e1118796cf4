# SPDX-License-Identifier: Apache-2.0
"""Streams of pair records as Arrow batches: read, change a column, write. For commands that rewrite whole data sets.

A batch is bounded in rows and in bytes, so a page-image set and a text set need the same memory. Rows are checked by
`embedrl_verl.curate.validity`, not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedrl_verl.data.files import publish, temporary_name
from embedrl_verl.data.parquet import SCHEMA, check_schema, in_pieces, opened
from embedrl_verl.errors import DataError

BATCH_ROWS = 2048
BATCH_BYTES = 32 << 20
GROUP_ROWS = 16384
GROUP_BYTES = 64 << 20

# Columns whose values repeat; a dictionary of pair ids or images would only be thrown away when it grows too large.
REPEATING = (
    "data_source",
    "instruction",
    "query_id",
    "target_id",
    *(f"{side}.{name}" for side in ("query", "target") for name in ("text", "kind", "instruction")),
)


@dataclass(frozen=True)
class Span:
    """Rows start..stop-1 of a file, whole row groups: the unit of work, and one part of what is written.

    Attributes:
        number: position in the order of the rows.
        file: parquet file of pair records.
        groups: row groups of the file, first and one past the last.
        start, stop: rows of the file, from 0.
    """

    number: int
    file: Path
    groups: tuple[int, int]
    start: int
    stop: int


@contextmanager
def open_pairs(path: str | Path) -> Iterator[pq.ParquetFile]:
    """A parquet file of pair records; errors of reading it inside the block become data errors."""
    try:
        with opened(path) as file:
            check_schema(file.schema_arrow, path)
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def spans(files: Sequence[Path], rows_per_span: int) -> list[Span]:
    """Cut files into spans of about `rows_per_span` rows, at borders of row groups. Reads the files' footers only."""
    found: list[Span] = []
    for path in files:
        with open_pairs(path) as file:
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        first, start, stop = 0, 0, 0
        for index, size in enumerate(sizes):
            if stop > start and stop + size - start > rows_per_span:
                found.append(Span(len(found), path, (first, index), start, stop))
                first, start = index, stop
            stop += size
        if stop > start:
            found.append(Span(len(found), path, (first, len(sizes)), start, stop))
    return found


def span_batches(span: Span, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of a span with the row of the file (from 0) at which each begins.

    Args:
        columns: names of columns to read, in `SCHEMA`; None reads them all. Missing optional columns and struct fields
            come out as null; a file's columns that are not in `SCHEMA` are not read.
    """
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    row = span.start
    with open_pairs(span.file) as file:
        present = [name for name in schema.names if name in file.schema_arrow.names]
        groups = range(*span.groups)
        rows = _rows_per_batch(file, groups, present)
        for batch in in_pieces(file, rows, row_groups=groups, columns=present, use_threads=False):
            batch.validate(full=True)  # strings are UTF-8, offsets lie inside their buffers
            yield row, conform(batch, schema)
            row += batch.num_rows


def batches(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """`span_batches` over a whole file."""
    for span in spans([Path(path)], rows_per_span=1 << 62):
        yield from span_batches(span, columns)


def chosen_batches(
    path: str | Path, numbers: npt.NDArray[np.int64], columns: Sequence[str] | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Batches of some rows of a file (`numbers`, ascending) with their numbers; other row groups are not read."""
    with open_pairs(path) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    borders = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    used = np.unique(np.searchsorted(borders, numbers, side="right") - 1)
    for run in np.split(used, np.flatnonzero(np.diff(used) > 1) + 1) if len(used) else ():
        first, last = int(run[0]), int(run[-1]) + 1
        span = Span(0, Path(path), (first, last), int(borders[first]), int(borders[last]))
        for row, batch in span_batches(span, columns):
            low, high = np.searchsorted(numbers, [row, row + batch.num_rows])
            here = numbers[low:high]
            if len(here) == batch.num_rows:
                yield here, batch
            elif len(here):
                yield here, batch.take(pa.array(here - row))


def rows_at(path: str | Path, numbers: Sequence[int], columns: Sequence[str] | None = None) -> list[pa.RecordBatch]:
    """Single rows of a file (from 0, ascending) as batches of one, copied out of what was read."""
    chosen = chosen_batches(path, np.asarray(numbers, np.int64), columns)
    return [batch.take(pa.array([place])) for _, batch in chosen for place in range(batch.num_rows)]


def conform(batch: pa.RecordBatch, schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    """The batch in exactly this schema: columns in its order, missing ones null, widths of strings and floats cast."""
    if batch.schema.equals(schema):
        return batch
    names = batch.schema.names
    columns = [
        _fit(batch.column(field.name), field.type) if field.name in names else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def with_values(lists: pa.Array, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    """Lists as long as these, null where these are, of other values.

    Args:
        lists: list array of any width.
        values: one for each of `pc.list_flatten(lists)`.
        kind: type of the result, a list.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, type=kind, mask=lists.is_null())


def set_field(batch: pa.RecordBatch, name: str, values: pa.Array | Sequence[object]) -> pa.RecordBatch:
    """The batch with one column, or one field of a struct column ("query.tcot"), replaced."""
    column, _, field = name.partition(".")
    index = batch.schema.get_field_index(column)
    kind = batch.schema.field(index).type
    wanted = kind.field(field).type if field else kind
    array = values if isinstance(values, pa.Array) else pa.array(values, wanted)
    if field:
        struct = batch.column(index)
        children = struct.flatten()
        children[kind.get_field_index(field)] = array
        array = pa.StructArray.from_arrays(children, fields=list(kind), mask=struct.is_null())
    return batch.set_column(index, batch.schema.field(index), array)


def _fit(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array in this type; missing fields of structs are null. Unlike `cast`, with every supported pyarrow."""
    if array.type.equals(kind):
        return array
    if pa.types.is_struct(kind) and pa.types.is_struct(array.type):
        known = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
        children = [
            _fit(known[field.name], field.type) if field.name in known else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_list(kind):
        return with_values(array, _fit(pc.list_flatten(array), kind.value_type), kind)
    return array.cast(kind)


class PartWriter:
    """Writes a parquet file of pair records from batches; it gets its name only when it is complete and on the disk.

    Row groups are bounded in rows and in bytes. The file depends on nothing but the batches and their borders.

    Attributes:
        rows: written so far.
    """

    def __init__(self, path: str | Path, schema: pa.Schema = SCHEMA) -> None:
        self.path = Path(path)
        self.rows = 0
        self._temporary = temporary_name(self.path)
        dictionary = [name for name in REPEATING if name.partition(".")[0] in schema.names]
        self._writer = pq.ParquetWriter(
            self._temporary, schema, use_dictionary=dictionary or False, write_page_checksum=True
        )
        self._schema = schema
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0

    def __enter__(self) -> PartWriter:
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch of the writer's schema."""
        if batch.num_rows == 0:
            return
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        self._pending_bytes += batch.nbytes
        self.rows += batch.num_rows
        if self._pending_rows >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
            if error is None and self.rows == 0:
                self._writer.write_table(self._schema.empty_table())  # older pyarrow cannot read a file without groups
            self._writer.close()
            if error is None:
                publish(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed writers left behind; no writer may be at work in `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _rows_per_batch(file: pq.ParquetFile, groups: range, columns: Sequence[str]) -> int:
    """Rows of about `BATCH_BYTES` in these columns, as the footer tells; between 1 and `BATCH_ROWS`."""
    rows = size = 0
    for group in map(file.metadata.row_group, groups):
        rows += group.num_rows
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema.partition(".")[0] in columns:
                size += column.total_uncompressed_size
    return max(1, min(BATCH_ROWS, rows * BATCH_BYTES // max(size, 1)))
