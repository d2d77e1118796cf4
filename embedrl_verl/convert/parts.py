# SPDX-License-Identifier: Apache-2.0
"""One part: rows in, a parquet file of pair records, its rejected rows and its counts out. Runs in a worker process.

The counts are written last, under a final name: a part either has them and is complete, or is done again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from embedrl_verl.convert.converter import Converter, RawRow, RowError, show
from embedrl_verl.convert.inputs import Root
from embedrl_verl.convert.media_store import MediaCounts, MediaStore
from embedrl_verl.convert.plan import Unit
from embedrl_verl.convert.rows import is_jsonl, read_rows
from embedrl_verl.data.files import part_name, publish, sha256_of, temporary_name, write_json
from embedrl_verl.data.schema import Item, PairRecord, input_kind
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError, EmbedRLError, ResourceError

NO_MEDIA = MediaCounts()


@dataclass(frozen=True)
class PartJob:
    """What all parts of a conversion share."""

    root: Root
    converter: Converter
    store: MediaStore
    work: Path

    def file(self, index: int, ending: str) -> Path:
        """A file of a part in the work folder: .parquet, .rejected.jsonl, .ids.npy, .rows.npy, .json (the counts)."""
        return self.work / part_name(index).replace(".parquet", ending)


@dataclass
class _Counts:
    rows: int = 0
    rejected: int = 0
    unused: int = 0
    records: int = 0


def rejected_entry(file: str, row: int | None, field: str, reason: str, pair_id: str = "") -> dict[str, Any]:
    """A line of `rejected.jsonl`: rows count from 0, lines of a jsonl file from 1; a whole file has neither."""
    entry: dict[str, Any] = {"file": file}
    if row is not None:
        entry |= {"line": row + 1} if is_jsonl(file) else {"row": row}
    return entry | {"field": field, "reason": reason} | ({"pair_id": pair_id} if pair_id else {})


def convert_part(job: PartJob, unit: Unit, doubles: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Make a part in the work folder. Returns its counts, which also stand in its `.json`.

    Args:
        doubles: number of a record in this part -> why it is rejected, when an earlier record has its id.

    Raises:
        ResourceError: the disk is full or refuses; the message names file and row.
        EmbedRLError: the converter itself fails on a row (not by `RowError`), with the row.
    """
    target = job.file(unit.index, ".parquet")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, rejected = temporary_name(target), temporary_name(job.file(unit.index, ".rejected.jsonl"))
    part = _Part(job, unit, doubles or {})
    try:
        with PairWriter(temporary) as writer, open(rejected, "w", encoding="utf-8") as log:
            part.fill(writer, log)
        job.store.flush()
        publish(temporary, target, flush_folder=False)
        publish(rejected, job.file(unit.index, ".rejected.jsonl"), flush_folder=False)
        _save(job.file(unit.index, ".ids.npy"), np.array(part.ids, np.uint64))
        _save(job.file(unit.index, ".rows.npy"), np.array(part.rows, np.int64))
        report = part.report() | {"bytes": target.stat().st_size, "sha256": sha256_of(target)}
        write_json(job.file(unit.index, ".json"), report)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        rejected.unlink(missing_ok=True)
        where = f"{unit.shard.file}, row {part.row}"
        raise ResourceError(
            f"cannot write while converting {where} ({error}). Finished parts are kept: make room, and run the same "
            "command again to go on"
        ) from error
    return report


class _Part:
    """The rows of one part on their way through converter, checks and media store."""

    def __init__(self, job: PartJob, unit: Unit, doubles: Mapping[int, str]) -> None:
        self.job, self.unit, self.doubles = job, unit, doubles
        self.made = 0
        self.row = unit.first
        self.counts, self.media = _Counts(), MediaCounts()
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.without_instruction: Counter[str] = Counter()
        self.ids: list[int] = []
        self.rows: list[int] = []

    def fill(self, writer: PairWriter, log: TextIO) -> None:
        for row, values in read_rows(self.job.root, self.unit.shard.file, self.unit.rows, self.unit.anchor):
            self.row = row
            self.counts.rows += 1
            pair_id = ""
            try:
                if isinstance(values, RowError):
                    raise values
                records = []
                for record in self._convert(RawRow(self.unit.shard, row, values)):
                    pair_id = str(record.pair_id)
                    check_record(record, self.unit.shard.source)
                    records.append(record)
                found = MediaCounts()
                for index, record in enumerate(records):
                    pair_id = record.pair_id
                    records[index] = self.job.store.put(record, found)
            except DataError as error:
                field, reason = (error.field, error.reason) if isinstance(error, RowError) else ("", str(error))
                self._reject(log, field, reason, pair_id)
                continue
            if found != NO_MEDIA:
                self.media.add(found)
            self.counts.unused += not records
            for record in records:
                if self.made in self.doubles:
                    self._reject(log, "pair_id", self.doubles[self.made], record.pair_id)
                else:
                    writer.add(record)
                    self._count(record)
                self.made += 1

    def _reject(self, log: TextIO, field: str, reason: str, pair_id: str) -> None:
        entry = rejected_entry(self.unit.shard.file, self.row, field, reason, pair_id)
        log.write(json.dumps(entry) + "\n")
        self.counts.rejected += 1

    def _convert(self, raw: RawRow) -> Iterator[PairRecord]:
        try:
            yield from self.job.converter.convert(raw)
        except DataError:
            raise
        except OSError as error:
            raise RowError("", f"a file of this row cannot be read ({error})") from error
        except Exception as error:  # a fault of the converter, not of the data: named, and the job stops
            raise EmbedRLError(
                f"the converter {self.job.converter.name} failed on {raw.shard.file}, row {raw.row}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _count(self, record: PairRecord) -> None:
        self.counts.records += 1
        kind = f"{input_kind(record, 'query')} > {input_kind(record, 'target')}"
        self.kinds[record.data_source, kind] += 1
        if not record.item("query").instruction:
            self.without_instruction[record.data_source] += 1
        self.ids.append(int.from_bytes(blake2b(record.pair_id.encode(), digest_size=8).digest(), "little"))
        self.rows.append(self.row)

    def report(self) -> dict[str, Any]:
        by_source: dict[str, dict[str, int]] = {}
        for (source, kind), count in sorted(self.kinds.items()):
            by_source.setdefault(source, {})[kind] = count
        return vars(self.counts) | {
            "doubles": len(self.doubles),
            "source": self.unit.shard.source,
            "kinds": by_source,
            "without_instruction": dict(sorted(self.without_instruction.items())),
            "media": vars(self.media),
        }


def check_record(record: PairRecord, source: str) -> None:
    """Types and Unicode of all texts, and the data source: what a data class does not check by itself."""
    for name in ("pair_id", "data_source", "instruction", "query_id", "target_id"):
        _check_text(getattr(record, name), name)
    if source and record.data_source != source:
        raise RowError("data_source", f"must be {source!r}, the source of the shard; got {record.data_source!r}")
    _check_item(record.query, "query")
    _check_item(record.target, "target")
    for index, item in enumerate(record.negatives):
        _check_item(item, f"negatives[{index}]")


def _check_item(item: Item, name: str) -> None:
    _check_text(item.text, name, ".text")
    _check_text(item.instruction, name, ".instruction")
    _check_text(item.tcot, name, ".tcot")
    for index, media in enumerate(item.images):
        _check_media(media, f"{name}.images[{index}]")
    if item.video is not None:
        for index, media in enumerate(item.video.frames):
            _check_media(media, f"{name}.video.frames[{index}]")
        if item.video.path is not None:
            _check_text(item.video.path, name, ".video.path")


def _check_media(media: Any, field: str) -> None:
    if isinstance(media, str):
        _check_text(media, field)
    elif not isinstance(media, bytes):
        raise RowError(field, f"must be a path or bytes; got {show(media)}")
    if not media:
        raise RowError(field, "must be a path or bytes; got an empty one")


def _check_text(value: Any, name: str, rest: str = "") -> None:
    if not isinstance(value, str):
        raise RowError(name + rest, f"must be a string; got {show(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(name + rest, f"holds a lone surrogate, which is no Unicode text ({error})") from error


def _save(path: Path, values: np.ndarray[Any, Any]) -> None:
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        np.save(file, values)
    publish(temporary, path, flush_folder=False)
