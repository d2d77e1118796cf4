# SPDX-License-Identifier: Apache-2.0
"""`embedrl data content-ids` as a job: parts in worker processes, near-duplicate images if wanted, report, data card.

Each span of the input becomes one part. With near duplicates, a first round over the same spans records how every
target image looks; then the groups are formed; then the parts are written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedrl_verl.curate.content_ids import IdTask, is_wanted, side_media, write_part
from embedrl_verl.curate.folders import bad_rows_watch, build_facts, finish, work_in, write_lines
from embedrl_verl.curate.id_report import IdReport, make_report, write_near_duplicates
from embedrl_verl.curate.jobs import ROWS_PER_PART, Entry, read_entry, rejected_in, run_tasks, worker_count
from embedrl_verl.curate.media_paths import merged_root
from embedrl_verl.curate.near_duplicates import Likeness, Looks, LookWriter, Representatives, near_groups
from embedrl_verl.curate.records import span_batches, spans
from embedrl_verl.curate.validity import bad_rows
from embedrl_verl.data.files import REJECTED_FILE, disk_errors, pair_files, part_facts, part_name, write_json
from embedrl_verl.data.identity import media_digest
from embedrl_verl.data.media import load_image
from embedrl_verl.errors import MediaError

REPORT_FILE = "content_ids.json"


@dataclass(frozen=True)
class IdSettings:
    """What decides the ids.

    Attributes:
        media_root: of all files; None = as their data cards say.
        overwrite: also replace ids that are there, of queries and targets.
        near: how alike target images must be to count as one; None = only equal bytes do.
    """

    media_root: str | None = None
    overwrite: bool = False
    near: Likeness | None = None


@dataclass(frozen=True)
class LookTask:
    """The round before an `IdTask`: the looks of its target images go to `looks` + .looks and .pictures."""

    ids: IdTask
    looks: Path


def fill_content_ids(
    paths: Sequence[str | Path],
    out: str | Path,
    settings: IdSettings | None = None,
    *,
    workers: int | None = None,
    rows_per_part: int = ROWS_PER_PART,
    max_bad_share: float = 0.01,
    command: Sequence[str] = ("embedrl", "data", "content-ids"),
) -> IdReport:
    """Write the pairs of files and data set folders to a new folder, with empty `query_id`s and `target_id`s filled.

    Args:
        paths: parquet files and data set folders.
        out: folder to write, or to go on with.
        workers: processes; None = the CPUs.
        rows_per_part: of the written files, about.
        max_bad_share: share of rows that may be unusable; they are left out and listed in `rejected.jsonl`.
        command: what the user called, noted in the folder.

    Raises:
        ConfigError: the folder is of something else.
        DataError: unreadable files, or too many bad rows; with the causes.
        ResourceError: full disk, killed worker; the same command goes on.
    """
    settings, out = settings or IdSettings(), Path(out)
    files = pair_files(paths)
    root, prefixes = merged_root(files, settings.media_root)
    pieces = spans(files, rows_per_part)
    total = sum(span.stop - span.start for span in pieces)
    near = asdict(settings.near) if settings.near else None
    facts = {
        "columns": ["query_id", "target_id"],
        "overwrite": settings.overwrite,
        "near_duplicates": near,
        "media_root": root,
        "rows_per_part": rows_per_part,
    }
    build = build_facts("embedrl data content-ids", facts, files)
    processes = worker_count(workers)
    with disk_errors(out), work_in(out, build, files, command) as work:
        if work is None:
            return IdReport.load(out / REPORT_FILE)
        tasks = [
            IdTask(
                span=span,
                part=out / part_name(span.number),
                media_root=root and os.path.join(root, prefixes[span.file]),
                prefix=prefixes[span.file],
                overwrite=settings.overwrite,
            )
            for span in pieces
        ]
        if settings.near:
            tasks = _look(tasks, settings.near, work, processes)
        journal = work / "parts"
        watch = bad_rows_watch(journal, total, max_bad_share, out / REJECTED_FILE)
        entries = run_tasks(write_part, tasks, journal, workers=processes, label="content ids", watch=watch)
        write_lines(out / REJECTED_FILE, rejected_in(journal))
        if settings.near:
            write_near_duplicates(out, [task.part for task in tasks], entries)
        report = make_report([task.part for task in tasks], entries)
        write_json(out / REPORT_FILE, report.as_dict())
        finish(
            out,
            "content ids",
            build,
            parts=[
                part_facts(task.part, read_entry(file)["written"]) for task, file in zip(tasks, entries, strict=True)
            ],
            by_source={name: source.pairs for name, source in report.sources.items()},
            media_root=root,
            rejected=out / REJECTED_FILE,
        )
    return report


def scan_looks(task: LookTask) -> Entry:
    """Write how the target images of one span look.

    Returns:
        blank (distinct blank images), unreadable (row, field, reason of targets with an image that cannot be decoded),
        rejected (empty; the rows are rejected when the parts are written).
    """
    unreadable: list[tuple[int, str, str]] = []
    with LookWriter(task.looks) as writer:
        for first_row, batch in span_batches(task.ids.span):
            good = is_wanted(batch, task.ids.overwrite, "target")
            good[list(bad_rows(batch, task.ids.span.file, first_row))] = False
            rows = np.flatnonzero(good)
            found = side_media(batch["target"].take(pa.array(rows)), "target")
            for row, media in zip((rows + first_row).tolist(), found, strict=True):
                for name, medium in media:
                    if name == "target.video.path":
                        continue
                    try:
                        digest = media_digest(medium, task.ids.media_root)
                        if not writer.has(digest):
                            writer.add(digest, load_image(medium, task.ids.media_root))
                    except MediaError as error:
                        unreadable.append((row, name, str(error)))
                        break
    return {"blank": writer.blank, "unreadable": unreadable, "rejected": []}


def _look(tasks: Sequence[IdTask], likeness: Likeness, work: Path, workers: int) -> list[IdTask]:
    """The tasks with near-duplicate images: look at all, group them, save who stands for whom."""
    folder, saved = work / "looks", work / "representatives.npy"
    looks = [LookTask(task, folder / f"{task.span.number:06d}") for task in tasks]
    entries = run_tasks(scan_looks, looks, folder, workers=workers, label="how images look")
    if not saved.is_file():
        known = Looks([task.looks for task in looks])
        Representatives.of_groups(known, near_groups(known, likeness)).save(saved)
    unreadable = [tuple(map(tuple, read_entry(file)["unreadable"])) for file in entries]
    return [replace(task, representatives=saved, unreadable=rows) for task, rows in zip(tasks, unreadable, strict=True)]
