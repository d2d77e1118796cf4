# SPDX-License-Identifier: Apache-2.0
"""Raw rows of parquet, JSON lines and Arrow files (`datasets`' `save_to_disk`), memory-mapped.

Parquet and JSON lines are copied once to Arrow, which gives any row at once. Lines are copied as bytes and parsed one
by one, so that a bad line is one bad row with its number.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.convert.converter import RowError, show
from embedrl_verl.data.files import publish, temporary_name
from embedrl_verl.data.parquet import READ_BUFFER, bounded
from embedrl_verl.errors import DataError

Raw: TypeAlias = "dict[str, Any] | RowError | None"
"""The values of a row, why there are none, or None for a blank line."""
BYTES_AT_ONCE = 8 << 20


def is_jsonl(name: str) -> bool:
    """JSON lines, packed or not: rows are lines, and are named from 1 in reports."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def as_arrow(name: str, path: Path, cache: Path) -> Path:
    """The Arrow file with the rows of a file: its copy in `cache`, made if it is not there, or itself."""
    copy = path if name.endswith(".arrow") else cache / f"{name}.arrow"
    if copy.is_file():
        return copy
    batches = _batches(name, path)
    first = next(batches, pa.record_batch({}))
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(copy)
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)
        publish(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    return copy


def count_rows(name: str, arrow: Path) -> int:
    """Rows of the Arrow file that `as_arrow` made of a file. Raises DataError if it ends early."""
    with _reading(name):
        return sum(batch.num_rows for batch in _mapped(arrow))


def read_rows(arrow: Path, wanted: Sequence[int], lines: bool) -> Iterator[tuple[int, Raw]]:
    """The wanted rows (ascending), each with its number. With `lines` they are lines of JSON."""
    numbers, start = np.asarray(wanted, np.int64), 0
    for batch in _mapped(arrow):
        low, high = np.searchsorted(numbers, (start, start + batch.num_rows))
        for number in numbers[low:high].tolist():
            row = batch.slice(number - start, 1)  # not `take`, which knows no views
            yield number, _object(row["line"][0].as_py(), number) if lines else _values(row)
        start += batch.num_rows
        if high == len(numbers):
            return


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name}: cannot be read ({why}); mend it, or take it away, and begin anew with --restart"
        ) from error


def _batches(name: str, path: Path) -> Iterator[pa.RecordBatch]:
    with _reading(name):
        if is_jsonl(name):
            with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
                while lines := file.readlines(BYTES_AT_ONCE):
                    yield pa.record_batch({"line": pa.array(lines, pa.large_binary())})
        elif name.endswith(".parquet"):
            with pq.ParquetFile(path, buffer_size=READ_BUFFER, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                if len(set(names)) < len(names):
                    raise DataError(f"{name}: cannot be read (two columns have one name: {', '.join(names)})")
                yield from bounded(file, range(file.num_row_groups))
        else:
            raise DataError(f"{name}: unknown kind of file; known are .parquet, .jsonl, .jsonl.gz and .arrow")


def _mapped(arrow: Path) -> Iterator[pa.RecordBatch]:
    """Batches of the mapped file. Not kept: pages that were read count as memory until the map is let go."""
    with pa.memory_map(str(arrow)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def _values(row: pa.RecordBatch) -> dict[str, Any] | RowError:
    name, values = "", {}
    try:
        for name in row.schema.names:
            values[name] = row[name][0].as_py()
    except UnicodeDecodeError as error:
        return RowError(name, f"a string must be UTF-8 ({error})")
    return values


def _object(line: bytes, number: int) -> Raw:
    try:
        text = line.decode("utf-8" if number else "utf-8-sig")
        if not text.strip():
            return None
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError("", f"the line is not JSON in UTF-8 ({' '.join(str(error).split())[:200]})")
    return values if isinstance(values, dict) else RowError("", f"a line must be a JSON object; got {show(values)}")
