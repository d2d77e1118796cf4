# SPDX-License-Identifier: Apache-2.0
"""Pair records by number, memory-mapped: what is in memory is the rows that were asked for.

`datasets` maps Arrow files, so each parquet file is copied once to one in its cache (`HF_DATASETS_CACHE`), in the
schema of data/parquet.py, and found there again as long as path, size and times of change are the same. All processes
of a machine share its pages.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedrl_verl.data.files import (
    disk_errors,
    media_root_of,
    pair_files,
    publish,
    read_object,
    stamp_of,
    temporary_name,
    write_json,
)
from embedrl_verl.data.parquet import SCHEMA, opened, read_batches, record_or_error
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import DataError, ResourceError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
FORMAT = "1"
"""Part of the name of a copy: another schema, another copy."""
ROWS_AT_ONCE = 64
ROWS_A_BATCH, BYTES_A_BATCH = 1024, 8 << 20


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
        identity: changes when a file changes.

    Raises:
        DataError: a file cannot be read, holds no pair records or is named twice; a folder is unfinished.
    """

    def __init__(self, paths: Iterable[str | Path], media_root: str | None = None) -> None:
        from datasets import concatenate_datasets  # slow to import

        self.files = pair_files(paths)
        self._media_roots = [media_root or media_root_of(file) for file in self.files]
        mapped, notes = zip(*map(_mapped, self.files), strict=True)
        self.identity = hashlib.sha256("".join(note["copy"] for note in notes).encode()).hexdigest()
        self.starts = list(accumulate(map(len, mapped), initial=0))
        self._data = concatenate_datasets(list(mapped))
        self._bad = [note["problems"] for note in notes]
        for file, note in zip(self.files, notes, strict=True):
            if note["not_read"]:
                logger.warning("%s: columns that are no part of a pair record are not read: %s", file, note["not_read"])

    @classmethod
    def readable(
        cls, paths: Iterable[str | Path], media_root: str | None = None
    ) -> tuple[PairTable | None, list[Problem]]:
        """The table of those files that can be read, and why others cannot; None if there are none."""
        files: list[Path] = []
        problems: list[Problem] = []
        for path in paths:
            try:
                parts = pair_files([path])
            except DataError as error:
                problems.append(Problem(str(path), None, str(error)))
                continue
            for part in parts:
                try:
                    _mapped(part)
                    files.append(part)
                except DataError as error:
                    problems.append(Problem(str(part), None, str(error)))
        return (cls(files, media_root) if files else None), problems

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

    def problems(self) -> dict[int, Problem]:
        """Rows that are no records, and rows whose `pair_id` an earlier record has, by number."""
        found = {
            start + row: Problem(str(file), row, message, source)
            for file, start, bad in zip(self.files, self.starts, self._bad, strict=False)
            for row, message, source in bad
        }
        return dict(sorted((found | self._repeated_ids(found)).items()))

    def _repeated_ids(self, bad: Mapping[int, Problem]) -> dict[int, Problem]:
        ids = self.column("pair_id").to_pandas().drop(index=list(bad))
        found = {}
        for number, earlier in first_rows(ids).items():
            (file, row), (other, other_row) = self.place(number), self.place(earlier)
            name = ids[number]
            message = f"{file}, row {row}, pair {name!r}: pair_id must be unique; {other}, row {other_row} has it too"
            found[number] = Problem(str(file), row, message, self.column("data_source")[number].as_py() or "")
        return found


def first_rows(ids: Any) -> dict[Any, Any]:
    """Places (the index) of a pandas Series whose id comes before, each with the place of the first that has it."""
    again = ids[ids.duplicated()]
    first = {name: number for number, name in reversed([*ids[ids.isin(again)].items()])}
    return {number: first[name] for number, name in again.items()}


def _plain(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches():
        yield from batch.to_pylist()


def cache_folder() -> Path:
    """Where copies of files, and what was found out about them, are kept: in the cache of `datasets`."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "embedrl_pairs"
    with disk_errors(f"{folder} (HF_DATASETS_CACHE names another place)"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mapped(file: Path) -> tuple[Dataset, dict[str, Any]]:
    """The file's copy, made if it is not there or damaged, and what is noted of it."""
    from datasets import Dataset

    key = f"{FORMAT}\0{file.resolve()}\0{stamp_of(file)}"
    copy = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    while True:
        made = not copy.is_file()
        if made:
            _make_copy(file, copy)
        try:
            data, note = Dataset.from_file(str(copy)), read_object(copy.with_suffix(".json"))
            if len(data) == note["rows"]:
                return data, note
            fault = f"{len(data)} of {note['rows']} rows"
        except (OSError, ValueError, DataError) as error:  # Arrow's are ValueErrors
            fault = str(error)
        if made:
            raise ResourceError(f"{copy}, the copy of {file}, cannot be read right after it was made: {fault}")
        logger.warning("%s, the copy of %s, is damaged (%s); it is made again", copy, file, fault)
        copy.unlink(missing_ok=True)


def _make_copy(file: Path, copy: Path) -> None:
    """Rows in batches of a good size, however many row groups they come in; those that are no records are noted."""
    stamp, temporary, bad, rows = stamp_of(file), temporary_name(copy), list[tuple[int, str, str]](), 0
    with disk_errors(f"{copy.parent} (HF_DATASETS_CACHE names another place)"):
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                waiting: list[pa.RecordBatch] = []
                size = written = 0
                for first, batch in read_batches(file):
                    waiting.append(batch)
                    size, rows = size + batch.nbytes, first + len(batch)
                    if rows - written >= ROWS_A_BATCH or size >= BYTES_A_BATCH:
                        writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                        waiting, size, written = [], 0, rows
                    for row, values in enumerate(batch.to_pylist(), first):
                        found = record_or_error(values, file, row)
                        if isinstance(found, DataError):
                            bad.append((row, str(found), values["data_source"] or ""))
                if waiting:
                    writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
            with opened(file) as parquet:
                unknown = [name for name in parquet.schema_arrow.names if name not in SCHEMA.names]
            if stamp_of(file) != stamp:
                raise DataError(f"{file} was changed while it was read; start again")
            note = {"copy": copy.name, "rows": rows, "problems": bad, "not_read": ", ".join(unknown)}
            write_json(copy.with_suffix(".json"), note)
            publish(temporary, copy, flush_folder=False)
        finally:
            temporary.unlink(missing_ok=True)
