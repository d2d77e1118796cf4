# SPDX-License-Identifier: Apache-2.0
"""Writing pair records to parquet, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.data.files import publish, temporary_name
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import Item, Media, PairRecord

ROWS_PER_GROUP, BYTES_PER_GROUP = 4096, 32 << 20


class PairWriter:
    """Writes pair records to a parquet file, in order, with bounded memory. A context manager.

    The file has its name when it is whole and on the disk: an error inside the block leaves what was there before.
    Row groups have `ROWS_PER_GROUP` rows or `BYTES_PER_GROUP` bytes at most; pages carry checksums.

    Attributes:
        rows: written so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.rows = Path(path), 0
        self._temporary = temporary_name(self.path)
        self._writer = pq.ParquetWriter(self._temporary, SCHEMA, write_page_checksum=True)
        self._records: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._pending = self._bytes = 0

    def __enter__(self) -> PairWriter:
        return self

    def add(self, record: PairRecord) -> None:
        """Append a record."""
        self._records.append(row_of(record))
        size = sum(len(media) for media in _media_of(record) if isinstance(media, bytes))
        self._count(1, size)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch in `SCHEMA`."""
        if batch.num_rows:
            self._to_batch()
            self._batches.append(batch)
            self._count(batch.num_rows, batch.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_group()
                if self.rows == 0:
                    self._writer.write_table(SCHEMA.empty_table())
            self._writer.close()
            if kind is None:
                publish(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _count(self, rows: int, size: int) -> None:
        self.rows += rows
        self._pending += rows
        self._bytes += size
        if self._pending >= ROWS_PER_GROUP or self._bytes >= BYTES_PER_GROUP:
            self._write_group()

    def _to_batch(self) -> None:
        if self._records:
            self._batches.append(pa.RecordBatch.from_pylist(self._records, schema=SCHEMA))
            self._records = []

    def _write_group(self) -> None:
        self._to_batch()
        if self._batches:
            table = pa.Table.from_batches(self._batches, SCHEMA)
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._batches, self._pending, self._bytes = [], 0, 0


def write_pairs(records: Iterable[PairRecord], path: str | Path) -> None:
    """Write records to a parquet file, in order; the folder is made if missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with PairWriter(path) as writer:
        for record in records:
            writer.add(record)


def _media_of(record: PairRecord) -> Iterator[Media]:
    for item in (record.query, record.target, *record.negatives):
        yield from item.images
        if item.video is not None:
            yield from item.video.frames


def row_of(record: PairRecord) -> dict[str, Any]:
    """The record as plain values of `SCHEMA`."""
    items = {"query": _row_from_item(record.query), "target": _row_from_item(record.target)}
    return {**vars(record), **items, "negatives": [_row_from_item(item) for item in record.negatives]}


def _row_from_item(item: Item) -> dict[str, Any]:
    video = item.video and {**vars(item.video), "frames": _structs(item.video.frames)}
    return {**vars(item), "images": _structs(item.images), "video": video}


def _structs(several: Iterable[Media]) -> list[dict[str, str | bytes | None]]:
    return [
        {"path": media, "bytes": None} if isinstance(media, str) else {"path": None, "bytes": media}
        for media in several
    ]
