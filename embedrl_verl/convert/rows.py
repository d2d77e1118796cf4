# SPDX-License-Identifier: Apache-2.0
"""Raw rows of parquet, JSON lines and Arrow files (`datasets`' `save_to_disk`): how many, and the wanted ones in order.

At most one batch of rows is in memory. What cannot be read becomes a `RowError` of its row, or the fault of a file;
good rows before and after it are given all the same.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.convert.converter import RowError, show
from embedrl_verl.convert.inputs import Root, remote_errors, unreadable
from embedrl_verl.data.parquet import in_pieces
from embedrl_verl.errors import DataError

Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
RawResult: TypeAlias = tuple[int, "dict[str, Any] | RowError"]

ANCHOR_EVERY = 1024
MAX_LINE = 256 << 20
"""Longest accepted line of JSON in bytes; a file that is no JSON lines at all may be one line."""
MAX_BATCH_ROWS, BATCH_BYTES = 512, 16 << 20
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class FileSurvey:
    """What a file holds, found without decoding its rows.

    Attributes:
        rows: rows that can be read; lines of a jsonl file.
        fault: why the file cannot be read, or ends early; "" if it is whole.
        anchors: byte offsets of lines 0, 1024, 2048, ... of a jsonl file.
    """

    rows: int
    fault: str = ""
    anchors: Rows | None = None

    def anchor(self, row: int) -> tuple[int, int]:
        """(line, byte offset) of the last anchor at or before a row; (0, 0) for other files."""
        if self.anchors is None:
            return 0, 0
        index = row // ANCHOR_EVERY
        return index * ANCHOR_EVERY, int(self.anchors[index])


def is_jsonl(name: str) -> bool:
    """JSON lines, packed or not: rows are lines, and are named from 1 in reports."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def survey(root: Root, name: str) -> FileSurvey:
    """Count the rows of a file."""
    try:
        if is_jsonl(name):
            return _survey_lines(root, name)
        if name.endswith(".parquet"):
            with _parquet(root, name) as file:
                return FileSurvey(file.metadata.num_rows)
        if name.endswith(".arrow"):
            return _survey_arrow(root, name)
    except (*READ_ERRORS, *remote_errors(), DataError) as error:
        if root.is_remote:
            raise unreadable(root.location, name, error) from error
        return FileSurvey(0, fault=f"not a readable {name.rsplit('.', 1)[-1]} file ({_short(error)})")
    raise DataError(f"{name}: unknown kind of file; known are .parquet, .jsonl, .jsonl.gz and .arrow")


def read_rows(root: Root, name: str, wanted: Rows, anchor: tuple[int, int] = (0, 0)) -> Iterator[RawResult]:
    """The wanted rows (ascending, from 0): number and values, or the error that says why there are none.

    Blank lines of a jsonl file are passed over.

    Args:
        anchor: `FileSurvey.anchor` of the first wanted row.
    """
    if len(wanted) == 0:
        return
    last = int(wanted[0]) - 1
    try:
        reader = _read_lines if is_jsonl(name) else _read_parquet if name.endswith(".parquet") else _read_arrow
        for row, values in reader(root, name, wanted, anchor):
            last = row
            yield row, values
    except (*READ_ERRORS, *remote_errors(), DataError) as error:
        if root.is_remote:
            raise unreadable(root.location, name, error) from error
        for row in wanted[wanted > last].tolist():
            yield row, RowError("", f"the file cannot be read here ({_short(error)})")


def _survey_lines(root: Root, name: str) -> FileSurvey:
    anchors, lines, position, last, fault = [0], 0, 0, b"\n", ""
    with root.open(name) as file:
        read = file.read1 if isinstance(file, gzip.GzipFile) else file.read  # read would lose what precedes a torn end
        try:
            while chunk := read(8 << 20):
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                first = ANCHOR_EVERY - 1 - lines % ANCHOR_EVERY
                anchors += (ends[first::ANCHOR_EVERY] + position + 1).tolist()
                lines, position, last = lines + len(ends), position + len(chunk), chunk[-1:]
        except READ_ERRORS as error:
            if root.is_remote:
                raise
            fault = f"the file ends early, after line {lines} ({_short(error)})"
    if last != b"\n" and not fault:
        lines += 1
    return FileSurvey(lines, fault, np.array(anchors, np.int64))


def _read_lines(root: Root, name: str, wanted: Rows, anchor: tuple[int, int]) -> Iterator[RawResult]:
    row, offset = anchor
    with root.open(name) as file:
        file.seek(offset)
        for number in wanted.tolist():
            while row < number:
                _next_line(file)
                row += 1
            line = _next_line(file)
            row += 1
            if line is None:
                yield number, RowError("", f"the line is over the limit of {MAX_LINE} bytes; write one object a line")
            elif line.strip():
                yield number, _object_of(line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line)


def _next_line(file: IO[bytes]) -> bytes | None:
    """The next line; None for one over the limit, which is passed over."""
    line = file.readline(MAX_LINE)
    if len(line) < MAX_LINE or line.endswith(b"\n"):
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
    return None


def _object_of(line: bytes) -> dict[str, Any] | RowError:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("", f"the line is not UTF-8 ({error})")
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else "; the line has no end, the file may be truncated"
        return RowError("", f"the line is not JSON ({_short(error)}){torn}")
    if not isinstance(values, dict):
        return RowError("", f"a line must be a JSON object; got {show(values)}")
    return values


def _parquet(root: Root, name: str) -> pq.ParquetFile:
    path = root.local_path(name)
    source = root.open(name) if path is None else path
    return pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)


def _read_parquet(root: Root, name: str, wanted: Rows, anchor: tuple[int, int]) -> Iterator[RawResult]:
    with _parquet(root, name) as file:
        first = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            chosen = wanted[(wanted >= first) & (wanted < first + facts.num_rows)]
            if len(chosen):
                size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
                yield from _read_group(file, group, first, chosen, size, root.is_remote)
            first += facts.num_rows


def _read_group(
    file: pq.ParquetFile, group: int, first: int, chosen: Rows, batch_rows: int, is_remote: bool
) -> Iterator[RawResult]:
    row = first
    try:
        for batch in in_pieces(file, batch_rows, row_groups=[group], use_threads=False):
            yield from _rows_of(batch, row, chosen)
            row += batch.num_rows
            if row > chosen[-1]:
                return
    except READ_ERRORS as error:
        if is_remote:
            raise
        for number in chosen[chosen >= row].tolist():
            yield number, RowError("", f"row group {group} cannot be read ({_short(error)})")


def _survey_arrow(root: Root, name: str) -> FileSurvey:
    rows, fault = 0, ""
    try:
        for batch in _arrow_batches(root, name):
            rows += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        if root.is_remote or rows == 0:
            raise
        fault = f"the file ends early, after row {rows - 1} ({_short(error)})"
    return FileSurvey(rows, fault)


def _read_arrow(root: Root, name: str, wanted: Rows, anchor: tuple[int, int]) -> Iterator[RawResult]:
    first = 0
    for batch in _arrow_batches(root, name):
        if first + batch.num_rows > wanted[0]:
            size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.get_total_buffer_size())))
            for start in range(0, batch.num_rows, size):
                yield from _rows_of(batch.slice(start, size), first + start, wanted)
        first += batch.num_rows
        if first > wanted[-1]:
            return


def _arrow_batches(root: Root, name: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file in either of its two formats, mapped and not read where the file is local."""
    path = root.local_path(name)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(root.open(name) if path is None else pa.memory_map(str(path)))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _rows_of(batch: pa.RecordBatch, first: int, wanted: Rows) -> Iterator[RawResult]:
    chosen = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
    if len(chosen) == 0:
        return
    if len(chosen) < batch.num_rows:
        batch = batch.take(pa.array(chosen - first))
    try:
        yield from zip(chosen.tolist(), batch.to_pylist(), strict=True)
    except UnicodeDecodeError:  # a string column holds other bytes: find the row
        for index, row in enumerate(chosen.tolist()):
            yield row, _one_row(batch.slice(index, 1))


def _one_row(batch: pa.RecordBatch) -> dict[str, Any] | RowError:
    values: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            values[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return RowError(name, f"a string must be UTF-8 ({error})")
    return values


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:200]
