# SPDX-License-Identifier: Apache-2.0
"""Raw rows of parquet, JSON lines and Arrow files (`datasets`' `save_to_disk`), memory-mapped by `datasets`.

Parquet and JSON lines are copied once to Arrow files in a folder of the job; which of their rows are wanted is asked
after that. JSON lines are read as text and parsed row by row, so that a bad line is one bad row with its number.
"""

from __future__ import annotations

import errno
import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.convert.converter import RowError, show
from embedrl_verl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Raw: TypeAlias = "dict[str, Any] | RowError | None"
"""The values of a row, why there are none, or None for a blank line."""

ROWS_AT_ONCE = 64
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_jsonl(name: str) -> bool:
    """JSON lines, packed or not: rows are lines, and are named from 1 in reports."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def as_arrow(name: str, path: Path, cache: Path) -> tuple[str, ...]:
    """The Arrow files with the rows of a file, made in `cache` if they are not there.

    Raises:
        DataError: the file cannot be read to its end, or has none of the known endings.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong with a file is in our error
    file, options = glob.escape(str(path)), {"cache_dir": str(cache)}
    try:
        if name.endswith(".arrow"):
            _mapped((str(path),))
            return (str(path),)
        if is_jsonl(name):
            with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as lines:
                if not lines.read(1):
                    return ()
            # A byte that is no UTF-8 becomes an escape that JSON does not know.
            features = datasets.Features({"line": datasets.Value("string")})
            read = datasets.Dataset.from_text(file, features=features, encoding_errors="backslashreplace", **options)
        elif name.endswith(".parquet"):
            if pq.read_metadata(path).num_rows == 0:
                return ()
            read = datasets.Dataset.from_parquet(file, batch_size=ROWS_AT_ONCE, **options)
        else:
            raise DataError(f"{name}: unknown kind of file; known are .parquet, .jsonl, .jsonl.gz and .arrow")
    except (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise cause from None
        why = " ".join(str(cause).split())[:200]
        raise DataError(
            f"{name}: cannot be read ({why}); mend it, or take it away, and begin anew with --restart"
        ) from error
    return tuple(str(part["filename"]) for part in read.cache_files)


def count_rows(arrow: tuple[str, ...]) -> int:
    """Rows of the Arrow files; lines of a jsonl file."""
    return len(_mapped(arrow)) if arrow else 0


def read_rows(arrow: tuple[str, ...], wanted: Sequence[int], lines: bool) -> Iterator[tuple[int, Raw]]:
    """The wanted rows, each with its number.

    Args:
        lines: the rows are lines of JSON.
    """
    if not wanted:
        return
    data = _mapped(arrow)
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        numbers = wanted[start : start + ROWS_AT_ONCE]
        table = data[numbers if isinstance(numbers, range) else list(numbers)]
        for number, values in zip(numbers, _plain(table), strict=True):
            yield int(number), _object(values["line"], int(number)) if lines and isinstance(values, dict) else values


def _mapped(arrow: tuple[str, ...]) -> Dataset:
    """The rows as Arrow tables, undecoded. Not kept: pages that were read count as memory until the map is let go."""
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(file) for file in arrow]).with_format("arrow")


def _plain(table: pa.Table) -> list[dict[str, Any] | RowError]:
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:  # a string column holds other bytes: find the row
        return [_one(table.slice(number, 1)) for number in range(table.num_rows)]


def _one(table: pa.Table) -> dict[str, Any] | RowError:
    values: dict[str, Any] = {}
    for name in table.column_names:
        try:
            values[name] = table.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return RowError(name, f"a string must be UTF-8 ({error})")
    return values


def _object(line: str, number: int) -> Raw:
    if number == 0:
        line = line.removeprefix("\ufeff")
    if not line.strip():
        return None
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError("", f"the line is not JSON in UTF-8 ({' '.join(str(error).split())[:200]})")
    return values if isinstance(values, dict) else RowError("", f"a line must be a JSON object; got {show(values)}")
