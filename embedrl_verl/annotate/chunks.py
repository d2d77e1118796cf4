# SPDX-License-Identifier: Apache-2.0
"""The input as chunks of rows, read in order and with little memory.

A chunk is a range of rows of one file. Its number, the same in every run over the same files, names its journal and its
part of the output. Chunks that are done are not read again: row groups that hold nothing else are skipped.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedrl_verl.data.parquet import SCHEMA, check_schema, opened, record_or_error
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import DataError

ROWS_PER_BATCH = 64


@dataclass(frozen=True)
class Chunk:
    """Rows first..first+rows-1 of a file. `number` counts chunks over all files, from 0."""

    number: int
    file: Path
    first: int
    rows: int


@dataclass(frozen=True)
class Row:
    """A row of the input: its record, or why there is none. `row` counts from 0 over the file."""

    file: Path
    row: int
    record: PairRecord | None
    field: str = ""
    reason: str = ""
    pair_id: str = ""


class ChunkedInput:
    """Files of pair records, cut into chunks."""

    def __init__(self, files: Sequence[Path], chunk_rows: int) -> None:
        self.files = list(files)
        self.chunks: list[Chunk] = []
        fingerprint = hashlib.sha256()
        for file in self.files:
            metadata = _metadata(file)
            fingerprint.update(_identity(file, metadata))
            self.chunks += [
                Chunk(len(self.chunks) + number, file, first, min(chunk_rows, metadata.num_rows - first))
                for number, first in enumerate(range(0, metadata.num_rows, chunk_rows))
            ]
        self.rows = sum(chunk.rows for chunk in self.chunks)
        if not self.rows:
            raise DataError(f"no row in {', '.join(map(str, self.files)) or 'no file'}; name files with pair records")
        self.fingerprint = fingerprint.hexdigest()
        self._doubles = _doubles(self.files)

    def read(self, wanted: Callable[[Chunk], bool]) -> Iterator[tuple[Chunk, Iterator[Row]]]:
        """The wanted chunks in order, each with an iterator of its rows that must be used up before the next."""
        for index, file in enumerate(self.files):
            chunks = [chunk for chunk in self.chunks if chunk.file == file and wanted(chunk)]
            if not chunks:
                continue
            rows = self._rows(file, index, chunks)
            for chunk in chunks:
                yield chunk, itertools.islice(rows, chunk.rows)

    def _rows(self, file: Path, index: int, chunks: Sequence[Chunk]) -> Iterator[Row]:
        """The rows of the chunks; row groups without any of them are not read."""
        first_id: dict[int, str] = self._doubles.get(index, {})
        wanted = np.array([(chunk.first, chunk.first + chunk.rows) for chunk in chunks])
        row = 0
        try:
            with opened(file) as parquet:
                columns = [name for name in SCHEMA.names if name in parquet.schema_arrow.names]
                for group in range(parquet.metadata.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    if not ((wanted[:, 0] < row + count) & (wanted[:, 1] > row)).any():
                        row += count
                        continue
                    for batch in parquet.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                        places = np.arange(row, row + batch.num_rows)
                        inside = ((places[:, None] >= wanted[:, 0]) & (places[:, None] < wanted[:, 1])).any(axis=1)
                        row += batch.num_rows
                        if inside.any():
                            kept = batch.filter(pa.array(inside))
                            for place, values in zip(places[inside].tolist(), kept.to_pylist(), strict=True):
                                yield _row(file, place, values, first_id.get(place))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read after row {row} ({error})") from error


def _row(file: Path, place: int, values: dict[str, Any], double_of: str | None) -> Row:
    pair_id = values["pair_id"] or ""
    if double_of is not None:
        reason = f"pair_id must be unique; {double_of} has {pair_id!r} too"
        return Row(file, place, None, "pair_id", reason, pair_id)
    record = record_or_error(values, file, place)
    if isinstance(record, DataError):
        reason = str(record).removeprefix(f"{file}, row {place}: ")
        field, _, rest = reason.removeprefix("field ").partition(": ")
        named = reason.startswith("field ")
        return Row(file, place, None, field if named else "", rest if named else reason, pair_id)
    return Row(file, place, record, pair_id=pair_id)


def _metadata(file: Path) -> Any:
    try:
        with opened(file) as parquet:
            check_schema(parquet.schema_arrow, file)
            return parquet.metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from error


def _identity(file: Path, metadata: Any) -> bytes:
    """A digest that changes with the file's content: sizes and statistics of all column chunks, from the footer."""
    groups = [metadata.row_group(group).to_dict() for group in range(metadata.num_row_groups)]
    return hashlib.sha256(repr((file.name, file.stat().st_size, groups)).encode()).digest()


def _doubles(files: Sequence[Path]) -> dict[int, dict[int, str]]:
    """Rows whose pair_id an earlier row has: file index -> row -> "file, row n" of the first.

    Memory: 8 bytes a row, and the ids whose hashes occur twice.
    """
    hashes = [np.fromiter((_hash(name) for name in _pair_ids(file)), dtype=np.uint64) for file in files]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    twice = set(values[counts > 1].tolist())
    doubles: dict[int, dict[int, str]] = {}
    if not twice:
        return doubles
    first: dict[str, str] = {}
    for index, file in enumerate(files):
        for row, (name, digest) in enumerate(zip(_pair_ids(file), hashes[index].tolist(), strict=True)):
            if digest not in twice or not name:
                continue
            if name in first:
                doubles.setdefault(index, {})[row] = first[name]
            else:
                first[name] = f"{file}, row {row}"
    return doubles


def _pair_ids(file: Path) -> Iterator[str]:
    try:
        with opened(file) as parquet:
            for batch in parquet.iter_batches(1 << 14, columns=["pair_id"]):
                yield from (name or "" for name in batch.column(0).to_pylist())
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}: column pair_id cannot be read ({error})") from error


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "little")
