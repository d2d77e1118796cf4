# SPDX-License-Identifier: Apache-2.0
"""Fill empty `query_id`s and `target_id`s, so that equal queries or targets are never negatives of each other.

An id names the content as `embedrl_verl.data.identity` sees it: the normalised text (of a query: instruction and text)
and the bytes of every image or frame. So masks are the same before and after; what changes is that no medium is hashed
again when training starts, that splits can be kept apart by content, and that near-duplicate target images (an option,
`near_duplicates`) can share an id.
Ids of the source are kept.

What is one content and what is not:
- The same text without media is one content, however many pairs have it: "yes" as the answer to two questions is one
  candidate, and embeds to one vector. A set with few classes so has many false negatives; the report shows their share.
- The same text with other media is another content: "Represent the given image." says nothing of the image.
- The target's instruction does not count, the query's does.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedrl_verl.curate.jobs import Entry
from embedrl_verl.curate.media_paths import with_prefix
from embedrl_verl.curate.near_duplicates import Representatives
from embedrl_verl.curate.records import PartWriter, Span, set_field, span_batches
from embedrl_verl.curate.validity import Mask, bad_rows, has_media, is_empty
from embedrl_verl.data.identity import media_digest, normalise_text, stated_content_id
from embedrl_verl.data.schema import SIDES, Media, Side
from embedrl_verl.errors import DataError, MediaError

CACHED_FILES = 1 << 16
IN_FILE = re.compile(r"^.*?, row \d+: (?:field (?P<field>\S+): )?(?P<reason>.*)$", re.DOTALL)


@dataclass(frozen=True)
class IdTask:
    """One part: read a span, write it with ids.

    Attributes:
        span: what to read.
        part: file to write.
        media_root: of the span's file; None if its media are bytes.
        prefix: for the media paths that are written, see `media_paths`.
        overwrite: also replace ids that are there.
        representatives: file of `Representatives`: near-duplicate media count as one; None = only equal bytes do.
        unreadable: rows of the file whose target media are known to be unreadable, with the reason.
    """

    span: Span
    part: Path
    media_root: str | None
    prefix: str = ""
    overwrite: bool = False
    representatives: Path | None = None
    unreadable: tuple[tuple[int, str, str], ...] = ()


@dataclass
class SourceIds:
    """How the target ids of one data source's pairs came about: given by the source, or made of a text, of media, or of
    media of which one stands in for a near duplicate."""

    given: int = 0
    text: int = 0
    media: int = 0
    near: int = 0


@dataclass
class _Notes:
    """What the task of a part remembers."""

    rows: int = 0
    sources: defaultdict[str, SourceIds] = field(default_factory=lambda: defaultdict(SourceIds))
    rejected: list[dict[str, Any]] = field(default_factory=list)
    near: list[dict[str, Any]] = field(default_factory=list)

    def count(self, sources: pa.Array, kinds: dict[str, Mask]) -> None:
        """Add rows to `sources`: a mask of the rows for each field of `SourceIds`."""
        encoded = sources.dictionary_encode()
        codes = pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False)
        names = encoded.dictionary.to_pylist()
        for kind, rows in kinds.items():
            numbers = np.bincount(codes[rows], minlength=len(names))
            for name, number in zip(names, numbers.tolist()[: len(names)], strict=True):
                if number:
                    counts = self.sources[name]
                    setattr(counts, kind, getattr(counts, kind) + number)


def write_part(task: IdTask) -> Entry:
    """Write one part with its ids. Rows that are no pairs, or whose media cannot be read for an id, are left out.

    Returns:
        rows (read), written, sources (counts by data source, see `SourceIds`), rejected (lines of `rejected.jsonl`) and
        near (an entry for each medium that has near duplicates: pair_id, group, medium, sha256).
    """
    notes = _Notes()
    namer = _Namer(task)
    with PartWriter(task.part) as writer:
        for first_row, batch in span_batches(task.span):
            errors = bad_rows(batch, task.span.file, first_row)
            ids = namer.name(batch, first_row, errors, notes)
            notes.rows += batch.num_rows
            for name, values in ids.items():
                batch = set_field(batch, name, values)
            batch = with_prefix(batch, task.prefix)
            if errors:
                pair_ids = batch["pair_id"]
                for index in sorted(errors):
                    pair_id = pair_ids[index].as_py()
                    notes.rejected.append(rejection(task.span.file, first_row + index, errors[index], pair_id))
                keep = np.ones(batch.num_rows, np.bool_)
                keep[list(errors)] = False
                batch = batch.filter(pa.array(keep))
            writer.write(batch)
    sources = {name: vars(counts) for name, counts in sorted(notes.sources.items())}
    counts = {"rows": notes.rows, "written": writer.rows, "sources": sources}
    return {**counts, "rejected": notes.rejected, "near": notes.near}


def rejection(file: Path, row: int, error: DataError, pair_id: str | None) -> dict[str, Any]:
    """A line of `rejected.jsonl` for a row of a file (from 0)."""
    parts = IN_FILE.match(str(error))
    name, reason = (parts["field"], parts["reason"]) if parts else ("", str(error))
    line = {"file": str(file), "row": row, "field": name or "", "reason": reason}
    return {**line, "pair_id": pair_id} if pair_id else line


def is_wanted(batch: pa.RecordBatch, overwrite: bool, side: Side) -> Mask:
    """Rows whose id of this side is made of its content."""
    return np.ones(batch.num_rows, np.bool_) if overwrite else is_empty(batch[f"{side}_id"])


class _Namer:
    """Ids of the queries and targets of a batch."""

    def __init__(self, task: IdTask) -> None:
        self._file = task.span.file
        self._media_root = task.media_root
        self._overwrite = task.overwrite
        self._unreadable = task.unreadable
        self._representatives = Representatives.load(task.representatives) if task.representatives else None
        self._digest_of_file = functools.lru_cache(CACHED_FILES)(self._digest)

    def name(
        self, batch: pa.RecordBatch, first_row: int, errors: dict[int, DataError], notes: _Notes
    ) -> dict[str, pa.Array]:
        """The columns query_id and target_id; rows whose media cannot be read join `errors`."""
        for row, name, reason in self._unreadable:
            if first_row <= row < first_row + batch.num_rows:
                errors.setdefault(row - first_row, DataError(f"{self._file}, row {row}: field {name}: {reason}"))
        near: list[int] = []
        columns = {}
        for side in SIDES:  # the target last: its groups are noted of rows that are written
            wanted = _but(is_wanted(batch, self._overwrite, side), errors)
            ids = batch[f"{side}_id"].to_pylist()
            texts = _texts(batch, side)
            media = wanted & has_media(batch[side])
            for index in np.flatnonzero(wanted & ~media).tolist():
                ids[index] = stated_content_id(texts(index))
            rows = np.flatnonzero(media)
            for index, found in zip(rows.tolist(), side_media(batch[side].take(pa.array(rows)), side), strict=True):
                try:
                    digests = self._digests(found)
                except MediaError as error:
                    errors[index] = DataError(f"{self._file}, row {first_row + index}: {error}")
                    continue
                if side == "target" and (grouped := self._group(digests)):
                    near.append(index)
                    pair_id = batch["pair_id"][index].as_py()
                    notes.near += [{"pair_id": pair_id, **medium} for medium in grouped]
                images = [digest for name, digest in digests.items() if name.startswith(f"{side}.images")]
                frames = [digest for name, digest in digests.items() if name.startswith(f"{side}.video")]
                ids[index] = stated_content_id(texts(index), images, frames)
            columns[f"{side}_id"] = pa.array(ids, pa.string())
        good = _but(np.ones(batch.num_rows, np.bool_), errors)
        is_near = np.zeros(batch.num_rows, np.bool_)
        is_near[near] = True
        kinds = {
            "given": good & ~wanted,
            "text": good & wanted & ~media,
            "media": good & media & ~is_near,
            "near": good & is_near,
        }
        notes.count(batch["data_source"], kinds)
        return columns

    def _digests(self, media: list[tuple[str, Media]]) -> dict[str, bytes]:
        """Name of a medium → SHA-256 of its bytes, in order."""
        digests = {}
        for name, medium in media:
            try:
                digests[name] = self._digest_of_file(medium) if isinstance(medium, str) else self._digest(medium)
            except MediaError as error:
                raise MediaError(f"field {name}: {error}") from error
        return digests

    def _digest(self, medium: Media) -> bytes:
        return media_digest(medium, self._media_root)

    def _group(self, digests: dict[str, bytes]) -> list[dict[str, str]]:
        """Put the representative in the place of every medium that has near duplicates; tells which."""
        grouped = []
        for name, digest in digests.items():
            representative = self._representatives.of(digest) if self._representatives else None
            if representative is not None:
                digests[name] = representative
                grouped.append({"group": representative.hex(), "medium": name, "sha256": digest.hex()})
        return grouped


def _but(rows: Mask, errors: Iterable[int]) -> Mask:
    """The rows without those of `errors`."""
    rows = rows.copy()
    rows[list(errors)] = False
    return rows


def _texts(batch: pa.RecordBatch, side: Side) -> Callable[[int], list[str]]:
    """The normalised texts of a row that its id is made of."""
    text, *_, instruction, _ = batch[side].flatten()
    columns = [text]
    if side == "query":
        columns = [pc.if_else(is_empty(instruction), batch["instruction"], instruction), text]
    values = [column.to_pylist() for column in columns]
    return lambda row: [normalise_text(column[row] or "") for column in values]


def side_media(items: pa.StructArray, side: Side) -> list[list[tuple[str, Media]]]:
    """The media of each item with the names of their fields ("target.images[0]"), images before frames."""
    found: list[list[tuple[str, Media]]] = [[] for _ in range(len(items))]
    _, images, video, *_ = items.flatten()
    frames, path, _ = video.flatten()
    for field_name, lists in ((f"{side}.images", images), (f"{side}.video.frames", frames)):
        paths, contents = pc.list_flatten(lists).flatten()
        last, number = -1, 0
        parents = pc.list_parent_indices(lists).to_pylist()
        for row, medium_path, content in zip(parents, paths.to_pylist(), contents.to_pylist(), strict=True):
            number = number + 1 if row == last else 0
            found[row].append((f"{field_name}[{number}]", content or medium_path))
            last = row
    for row in np.flatnonzero(~is_empty(path)).tolist():
        found[row].append((f"{side}.video.path", path[row].as_py()))
    return found
