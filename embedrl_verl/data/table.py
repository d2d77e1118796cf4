# SPDX-License-Identifier: Apache-2.0
"""Pair records by number, memory-mapped: what is in memory is the rows that were asked for.

`datasets` maps Arrow files, so each parquet file is copied once to one in its cache (`HF_DATASETS_CACHE`), in the
schema of data/parquet.py, and found there again as long as path, size and time of change are the same. All processes of
a machine share its pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedrl_verl.data.disk import disk_errors
from embedrl_verl.data.files import media_root_of, pair_files, publish, temporary_name
from embedrl_verl.data.parquet import SCHEMA, read_batches, record_or_error
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = "1"
"""Part of the name of a copy: another schema, another copy."""
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class LocatedPair:
    """A record and where it was read: file, and row counted from 0."""

    file: str
    row: int
    record: PairRecord

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, pair {self.record.pair_id!r}"


@dataclass(frozen=True)
class Problem:
    """Why a row, or with row None a whole file, cannot be used. `message` names file, row and field."""

    file: str
    row: int | None
    message: str
    data_source: str = ""


class PairTable:
    """The rows of some files, numbered from 0 in order: `table[i]` is a `LocatedPair`, or the `Problem` of a row that
    is none.

    Args:
        paths: parquet files and data set folders, which stand for their parts.
        media_root: of all files; None: as their data cards say.

    Attributes:
        files: parquet files, in order.
        starts: number of each file's first row, and the number of all rows.

    Raises:
        DataError: a file cannot be read, holds no pair records or is named twice; a folder is unfinished.
    """

    def __init__(self, paths: Iterable[str | Path], media_root: str | None = None) -> None:
        from datasets import concatenate_datasets  # slow to import

        self.files = pair_files(paths)
        self._media_roots = [media_root or media_root_of(file) for file in self.files]
        mapped = [_mapped(file) for file in self.files]
        self.starts = list(accumulate(map(len, mapped), initial=0))
        self._data = concatenate_datasets(mapped)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> LocatedPair | Problem:
        self.place(number)
        return self._located(number, self._data[number])

    def __iter__(self) -> Iterator[LocatedPair | Problem]:
        return self.rows(range(len(self)))

    def rows(self, numbers: Sequence[int]) -> Iterator[LocatedPair | Problem]:
        """Rows by number, in the order given, read some at a time."""
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            chunk = numbers[start : start + ROWS_AT_ONCE]
            table = self._data.with_format("arrow")[chunk if isinstance(chunk, range) else list(chunk)]
            for number, values in zip(chunk, _plain(table), strict=True):
                yield self._located(number, values)

    def _located(self, number: int, values: Mapping[str, Any]) -> LocatedPair | Problem:
        file, row = self.place(number)
        found = record_or_error(values, file, row)
        if isinstance(found, DataError):
            return Problem(str(file), row, str(found), values["data_source"] or "")
        return LocatedPair(str(file), row, found)

    def place(self, number: int) -> tuple[Path, int]:
        """File and row (from 0) of a row by number."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.files[index], number - self.starts[index]

    def media_root(self, number: int) -> str | None:
        """Media root of a row by number."""
        return self._media_roots[int(np.searchsorted(self.starts, number, side="right")) - 1]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `SCHEMA`, mapped and not read."""
        return self._data.data.column(name)

    def repeated_ids(self) -> dict[int, Problem]:
        """Rows whose `pair_id` an earlier row has, by number."""
        ids = self.column("pair_id").to_pandas()
        again = np.flatnonzero(ids.duplicated().to_numpy() & ids.fillna("").ne("").to_numpy())
        first = {name: number for number, name in reversed([*ids[ids.isin(ids.iloc[again])].items()])}
        found = {}
        for number in again.tolist():
            (file, row), (other, other_row) = self.place(number), self.place(first[ids[number]])
            message = (
                f"{file}, row {row}, pair {ids[number]!r}: pair_id must be unique; {other}, row {other_row} has it too"
            )
            found[number] = Problem(str(file), row, message, self.column("data_source")[number].as_py() or "")
        return found


def _plain(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _mapped(file: Path) -> Dataset:
    """The file's copy, made if it is not there."""
    from datasets import Dataset, config

    stat = file.stat()
    key = f"{FORMAT}\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    folder = Path(config.HF_DATASETS_CACHE) / "embedrl_pairs"
    copy = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    if not copy.is_file():
        with disk_errors(f"{folder} (set HF_DATASETS_CACHE to a folder with room)"):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(copy)
            try:
                with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                    for _, batch in read_batches(file):
                        writer.write_batch(batch)
                publish(temporary, copy, flush_folder=False)
            finally:
                temporary.unlink(missing_ok=True)
    return Dataset.from_file(str(copy))
