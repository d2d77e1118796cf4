# SPDX-License-Identifier: Apache-2.0
"""Some rows of large files: count by source, choose, and read only what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedrl_verl.curate.records import chosen_batches, open_pairs
from embedrl_verl.data.files import media_root_of, pair_files
from embedrl_verl.data.parquet import SCHEMA, record_or_error
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.data.video import even_indices
from embedrl_verl.errors import DataError

BATCH = 1 << 16
"""Rows of one short column that are read at a time."""
READ_ROWS = 4096
READ_BYTES = 32 << 20
"""Records, and bytes of them with their media, that are read at a time."""
NO_SOURCE = "(no source)"


@dataclass(frozen=True)
class Row:
    """A row where it was read: file and row from 0. `found` is its record, or why it is none."""

    file: Path
    row: int
    found: PairRecord | DataError
    media_root: str | None


@dataclass(frozen=True)
class RowIndex:
    """All rows of some files, numbered from 0 in order; 2 bytes a row.

    Attributes:
        files: parquet files.
        starts: number of each file's first row, and the number of all rows.
        sources: names of data sources; `codes` holds their positions for each row, uint16.
        media_roots: of each file.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    sources: tuple[str, ...]
    codes: NDArray[np.uint16]
    media_roots: tuple[str | None, ...]

    def __len__(self) -> int:
        return self.starts[-1]

    def counts(self) -> dict[str, int]:
        """Rows of each source, by name."""
        numbers = np.bincount(self.codes, minlength=len(self.sources)).tolist()
        return dict(sorted(zip(self.sources, numbers, strict=True)))


def index_rows(paths: Iterable[str | Path], media_root: str | None = None) -> RowIndex:
    """Read the data source of every row.

    Args:
        paths: parquet files and data set folders.
        media_root: of all files; None: each data set folder's own.
    """
    files = pair_files(paths)
    roots = tuple(media_root_of(file) if media_root is None else media_root for file in files)
    codes: dict[str, int] = {}
    parts: list[NDArray[np.uint16]] = []
    starts = [0]
    for file in files:
        rows = 0
        for names in _column(file, "data_source"):
            for name in dict.fromkeys(names):  # in order, so that a seed draws the same rows again
                codes.setdefault(name or NO_SOURCE, len(codes))
            if len(codes) > np.iinfo(np.uint16).max:
                raise DataError(f"{file}: over 65,535 data sources; data_source names where a record comes from")
            parts.append(np.array([codes[name or NO_SOURCE] for name in names], dtype=np.uint16))
            rows += len(names)
        starts.append(starts[-1] + rows)
    if starts[-1] == 0:
        raise DataError(f"no rows in {', '.join(map(str, files))}")
    return RowIndex(tuple(files), tuple(starts), tuple(codes), np.concatenate(parts), roots)


def choose(index: RowIndex, limit: int, seed: int | None = None) -> list[int]:
    """Numbers of at most `limit` rows, in order; every source has a share by its size, and one row at least.

    Args:
        seed: None spaces the rows of a source evenly from first to last; a number draws them at random.
    """
    if limit >= len(index):
        return list(range(len(index)))
    generator = None if seed is None else np.random.default_rng(seed)
    chosen: list[int] = []
    for code, count in enumerate(_shares(np.bincount(index.codes, minlength=len(index.sources)).tolist(), limit)):
        if count == 0:
            continue
        rows = np.flatnonzero(index.codes == code)
        places = even_indices(len(rows), count) if generator is None else generator.choice(len(rows), count, False)
        chosen += rows[places].tolist()
    return sorted(chosen)


def rows_with_ids(index: RowIndex, ids: Sequence[str]) -> list[int]:
    """Numbers of the rows with these pair ids, in the order of the ids (an id that comes twice gives all its rows)."""
    found: dict[str, list[int]] = {name: [] for name in ids}
    for file, start in zip(index.files, index.starts, strict=False):
        row = start
        for names in _column(file, "pair_id"):
            for offset, name in enumerate(names):
                if name in found:
                    found[name].append(row + offset)
            row += len(names)
    missing = [name for name, rows in found.items() if not rows]
    if missing:
        raise DataError(
            f"no row has the pair_id {missing[0]!r}" + (f" (and {len(missing) - 1} more)" * (len(missing) > 1))
        )
    return [row for rows in found.values() for row in rows]


def ids_of(index: RowIndex, numbers: Iterable[int]) -> set[str]:
    """The pair ids of rows by number."""
    wanted = np.array(sorted(numbers), dtype=np.int64)
    found: set[str] = set()
    for number, file in enumerate(index.files):
        first, last = np.searchsorted(wanted, index.starts[number : number + 2])
        for _, batch in chosen_batches(file, wanted[first:last] - index.starts[number], ["pair_id"]):
            found.update(name for name in batch[0].to_pylist() if name)
    return found


def read_rows(index: RowIndex, numbers: Iterable[int]) -> Iterator[Row]:
    """Rows by number, in order; row groups without any of them are not read."""
    wanted = np.array(sorted(numbers), dtype=np.int64)
    for number, file in enumerate(index.files):
        first, last = np.searchsorted(wanted, index.starts[number : number + 2])
        local = wanted[first:last] - index.starts[number]
        if len(local):
            yield from _read_file(file, local, index.media_roots[number])


def _read_file(path: Path, rows: NDArray[np.int64], media_root: str | None) -> Iterator[Row]:
    with open_pairs(path) as file:
        columns = [name for name in SCHEMA.names if name in file.schema_arrow.names]
        stop = 0
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            start, stop = stop, stop + facts.num_rows
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if not len(wanted):
                continue
            size = max(1, min(READ_ROWS, READ_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns):
                inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
                for row, values in zip(inside.tolist(), batch.take(inside - start).to_pylist(), strict=True):
                    yield Row(path, row, record_or_error(values, path, row), media_root)
                start += batch.num_rows
                if start > wanted[-1]:
                    break


def _column(path: Path, name: str) -> Iterator[list[str | None]]:
    with open_pairs(path) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=[name]):
            yield batch.column(0).to_pylist()


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many of each source: by size, at least one while there is room, `limit` together."""
    present = [number for number, size in enumerate(sizes) if size]
    shares = [0] * len(sizes)
    if limit <= len(present):
        for place in even_indices(len(present), limit) if limit else ():
            shares[present[place]] = 1
        return shares
    total, left = sum(sizes), limit
    # Small sources first, so that what rounding up takes comes from the large ones.
    for number in sorted(present, key=lambda number: sizes[number]):
        share = min(sizes[number], max(1, round(left * sizes[number] / total)))
        shares[number] = share
        left, total = left - share, total - sizes[number]
    return shares
