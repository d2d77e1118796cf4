# SPDX-License-Identifier: Apache-2.0
"""`embedrl data content-ids`: fill empty `query_id`s and `target_id`s, so that equal queries or targets are never
negatives of each other.

Each span of the input becomes one part. With near duplicates, a first round over the same spans records how every
target image looks; then the groups are formed; then the parts are written.
"""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedrl_verl.curate.id_report import count_ids, id_report, write_near_duplicates
from embedrl_verl.curate.media_paths import merged_root, with_prefix
from embedrl_verl.curate.near_duplicates import Likeness, representatives, write_looks
from embedrl_verl.curate.report import JobReport
from embedrl_verl.data.build import Report, build_facts, building, finish, make_parts, rejection
from embedrl_verl.data.files import pair_files, part_name, read_object, write_json
from embedrl_verl.data.identity import media_digest, normalise_text, stated_content_id
from embedrl_verl.data.media import load_image
from embedrl_verl.data.parquet import Span, scan_rows, spans
from embedrl_verl.data.pool import worker_count
from embedrl_verl.data.schema import SIDES, Item, Media, PairRecord, Side
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError, MediaError

ROWS_PER_PART, CACHED_FILES = 50_000, 1 << 16
REPORT_FILE = "content_ids.json"
Digest = Callable[[Media], bytes]


@dataclass(frozen=True)
class IdSettings:
    """Without `near` only images of equal bytes are one; without a `media_root` each data card says its own."""

    media_root: str | None = None
    overwrite: bool = False
    near: Likeness | None = None


@dataclass(frozen=True)
class IdTask:
    """One part. `near` names the file that says which media stand for which; `unreadable` has lines of `rejected.jsonl`
    of rows whose images cannot be looked at."""

    span: Span
    media_root: str | None
    prefix: str | None
    overwrite: bool
    near: Path | None = None
    unreadable: dict[int, dict[str, Any]] = field(default_factory=dict)

    def fills(self, record: PairRecord, side: Side) -> bool:
        """Whether the id of this side is made of its content."""
        return self.overwrite or not getattr(record, f"{side}_id")

    def digest(self) -> Digest:
        """SHA-256 of media; a file that many rows name is read once."""
        of_file = functools.lru_cache(CACHED_FILES)(functools.partial(media_digest, media_root=self.media_root))
        return lambda medium: media_digest(medium, None) if isinstance(medium, bytes) else of_file(medium)


def fill_content_ids(
    paths: Sequence[str | Path],
    out: str | Path,
    settings: IdSettings | None = None,
    *,
    workers: int | None = None,
    rows_per_part: int = ROWS_PER_PART,
    max_bad_share: float = 0.01,
    command: Sequence[str] = ("embedrl", "data", "content-ids"),
) -> JobReport:
    """Write the pairs of files and data set folders to a new folder, with empty `query_id`s and `target_id`s filled, or
    go on with that."""
    settings, out = settings or IdSettings(), Path(out)
    processes, files = worker_count(workers), pair_files(paths)
    root, prefixes = merged_root(files, settings.media_root)
    options = {**asdict(settings), "media_root": root, "rows_per_part": rows_per_part}
    facts = build_facts("embedrl data content-ids", options, files)
    tasks = [
        IdTask(span, (root and ahead is not None and os.path.join(root, ahead)) or None, ahead, settings.overwrite)
        for span in spans(files, rows_per_part)
        for ahead in [prefixes[span.file]]
    ]
    rows = sum(task.span.stop - task.span.start for task in tasks)
    limits: Any = {"rows": rows, "workers": processes, "max_bad_share": max_bad_share}
    with building(out, facts, command, stamps=[file.stat().st_mtime_ns for file in files]) as work:
        if work is None:
            return id_report(read_object(out / REPORT_FILE))
        if settings.near:
            tasks = _look(tasks, settings.near, work, limits)
        reports = make_parts(write_part, tasks, work, label="content ids", **limits)
        parts = [out / part_name(number) for number in range(len(tasks))]
        if settings.near:
            write_near_duplicates(out, parts, [line for report in reports for line in report["near"]])
        values = count_ids(parts, reports)
        write_json(out / REPORT_FILE, values)
        finish(out, "content ids", facts, reports, media_root=root)
    return id_report(values)


def _look(tasks: Sequence[IdTask], likeness: Likeness, work: Path, limits: dict[str, Any]) -> list[IdTask]:
    """The tasks with near-duplicate images: look at all, and save who stands for whom."""
    folder, near = work / "looks" / "reports", work / "representatives.npy"
    folder.mkdir(parents=True, exist_ok=True)
    reports = make_parts(scan_looks, tasks, folder, label="how images look", **limits)
    stands_for = representatives([folder.parent / part_name(number) for number in range(len(tasks))], likeness)
    np.save(near, np.array([[*stands_for], [*stands_for.values()]], "V32"))
    unreadable = [{line["row"]: line for line in report["rejected"]} for report in reports]
    return [replace(task, near=near, unreadable=rows) for task, rows in zip(tasks, unreadable, strict=True)]


def write_part(task: IdTask, part: Path) -> Report:
    """Write one part with its ids. The report also has `rows` read, `ids` (source -> kind of target id -> pairs) and
    `near` (a line for each medium that has near duplicates)."""
    digest, stands_for = task.digest(), dict[bytes, bytes]()
    if task.near:
        stands_for = dict(zip(*np.load(task.near).tolist(), strict=True))
    ids: defaultdict[str, Counter[str]] = defaultdict(Counter)
    report: Report = {"rows": 0, "rejected": [], "near": [], "ids": ids}
    with PairWriter(part) as writer:
        for row, values, record in scan_rows(task.span):
            report["rows"] += 1
            if row in task.unreadable:
                report["rejected"].append(task.unreadable[row])
                continue
            try:
                filled, kind, near = _filled(task, record, digest, stands_for)
                moved = with_prefix(filled, task.prefix)
            except DataError as error:
                report["rejected"].append(rejection(task.span.file, row, error, values["pair_id"]))
                continue
            report["near"] += [{"pair_id": filled.pair_id, **line} for line in near]
            ids[filled.data_source][kind] += 1
            writer.add(moved)
    return {**report, "records": writer.rows, "by_source": {name: kinds.total() for name, kinds in ids.items()}}


def scan_looks(task: IdTask, part: Path) -> Report:
    """The round before, for near duplicates: write how the target images of a span look."""
    rejected: list[dict[str, Any]] = []
    write_looks(part, _target_images(task, rejected))
    return {"records": 0, "by_source": {}, "rejected": rejected}


def _target_images(task: IdTask, rejected: list[dict[str, Any]]) -> Iterator[tuple[bytes, Image.Image]]:
    """Each distinct image that a target's id is made of, with its SHA-256."""
    digest, seen = task.digest(), set[bytes]()
    for row, values, record in scan_rows(task.span):
        if isinstance(record, DataError) or not task.fills(record, "target"):
            continue
        for name, medium in _media(record.target, "target"):
            try:
                if not name.endswith(".path") and (key := digest(medium)) not in seen:
                    yield key, load_image(medium, task.media_root)
                    seen.add(key)
            except MediaError as error:
                bad = DataError(f"field {name}: {error}")
                rejected.append(rejection(task.span.file, row, bad, values["pair_id"]))
                break


def _filled(
    task: IdTask, record: PairRecord | DataError, digest: Digest, stands_for: dict[bytes, bytes]
) -> tuple[PairRecord, str, list[dict[str, str]]]:
    """The record with its ids, the kind of its target's, and its target's media that have near duplicates."""
    if isinstance(record, DataError):
        raise record
    ids, kind, near = {"query": record.query_id, "target": record.target_id}, "given", []
    for side in SIDES:
        if not task.fills(record, side):
            continue
        item, digests = record.item(side), list[bytes]()
        for name, medium in _media(item, side):
            try:
                own = digest(medium)
            except MediaError as error:
                raise DataError(f"field {name}: {error}") from error
            if side == "target" and own in stands_for:
                near.append({"group": stands_for[own].hex(), "medium": name, "sha256": own.hex()})
                own = stands_for[own]
            digests.append(own)
        texts = [normalise_text(text) for text in ([item.instruction, item.text] if side == "query" else [item.text])]
        ids[side] = stated_content_id(texts, digests[: len(item.images)], digests[len(item.images) :])
        kind = "near" if near else "media" if digests else "text"  # the target comes last
    kind = kind if task.fills(record, "target") else "given"
    return replace(record, query_id=ids["query"], target_id=ids["target"]), kind, near


def _media(item: Item, side: Side) -> Iterator[tuple[str, Media]]:
    """The media of an item with the names of their fields ("target.images[0]"), images before frames."""
    yield from ((f"{side}.images[{index}]", image) for index, image in enumerate(item.images))
    if item.video is not None:
        yield from ((f"{side}.video.frames[{index}]", frame) for index, frame in enumerate(item.video.frames))
        if item.video.path is not None:
            yield f"{side}.video.path", item.video.path
