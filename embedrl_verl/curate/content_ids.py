# SPDX-License-Identifier: Apache-2.0
"""`embedrl data content-ids`: fill empty `query_id`s and `target_id`s, so that equal queries or targets are never
negatives of each other.

Each span of the input becomes one part. With near duplicates, a first round over the same spans records how every
target image looks; then the groups are formed; then the parts are written, and what is in them is counted.
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

from embedrl_verl.curate.job import JobReport, merged_root, with_prefix
from embedrl_verl.curate.near_duplicates import Likeness, representatives, write_looks
from embedrl_verl.data.build import Report, build_facts, building, finish, make_parts, rejection, write_lines
from embedrl_verl.data.files import pair_files, part_name, read_object, write_json
from embedrl_verl.data.identity import false_negative_share, media_digest, normalise_text, stated_content_id
from embedrl_verl.data.media import load_image
from embedrl_verl.data.parquet import Span, read_batches, read_rows, scan_rows, spans
from embedrl_verl.data.pool import worker_count
from embedrl_verl.data.schema import SIDES, Item, Media, PairRecord, Side
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.tables import table

ROWS_PER_PART, CACHED_FILES = 50_000, 1 << 16
KINDS = ("given", "text", "media", "near")
LARGEST_SHOWN, TEXT_SHOWN = 3, 60
GROUPS_LISTED, MEMBERS_LISTED, PAIRS_TO_LOOK_AT = 1000, 20, 400
REPORT_FILE = "content_ids.json"
GROUPS_FILE = "near_duplicates.jsonl"
PAIRS_FILE = "near_duplicates.parquet"
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
    settings, out, files = settings or IdSettings(), Path(out), pair_files(paths)
    root, prefixes = merged_root(files, settings.media_root)
    options = {**asdict(settings), "media_root": root, "rows_per_part": rows_per_part}
    facts = build_facts("embedrl data content-ids", options, files)
    tasks = []
    for span in spans(files, rows_per_part):
        ahead = prefixes[span.file]
        here = None if root is None or ahead is None else os.path.join(root, ahead)
        tasks.append(IdTask(span, here, ahead, settings.overwrite))
    rows = sum(task.span.stop - task.span.start for task in tasks)
    limits: Any = {"rows": rows, "workers": worker_count(workers), "max_bad_share": max_bad_share}
    with building(out, facts, command, stamps=[file.stat().st_mtime_ns for file in files]) as work:
        if work is None:
            return id_report(read_object(out / REPORT_FILE))
        if settings.near:
            tasks = _look(tasks, settings.near, work, limits)
        reports = make_parts(write_part, tasks, work, label="content ids", **limits)
        parts = [out / part_name(number) for number in range(len(tasks))]
        if settings.near:
            write_near_duplicates(out, parts, reports)
        values = count_ids(parts, reports)
        write_json(out / REPORT_FILE, values)
        finish(out, "content ids", facts, reports, media_root=root)
    return id_report(values)


def _look(tasks: Sequence[IdTask], likeness: Likeness, work: Path, limits: dict[str, Any]) -> list[IdTask]:
    """The tasks with near-duplicate images: look at all, and save who stands for whom."""
    folder, near = work / "looks" / "reports", work / "representatives.npy"
    folder.mkdir(parents=True, exist_ok=True)
    reports = make_parts(write_looks_of, tasks, folder, label="how images look", **limits)
    stands_for = representatives([folder.parent / part_name(number) for number in range(len(tasks))], likeness)
    np.save(near, np.array([[*stands_for], [*stands_for.values()]], "V32"))
    unreadable = [{line["row"]: line for line in report["rejected"]} for report in reports]
    return [replace(task, near=near, unreadable=rows) for task, rows in zip(tasks, unreadable, strict=True)]


def write_looks_of(task: IdTask, part: Path) -> Report:
    """The round before, for near duplicates: write how the images look that a target's id of the span is made of."""
    digest, seen, rejected = task.digest(), set[bytes](), list[dict[str, Any]]()

    def images() -> Iterator[tuple[bytes, Image.Image]]:
        for row, values, record in scan_rows(task.span):
            if isinstance(record, DataError) or not task.fills(record, "target"):
                continue
            try:
                for name, medium in _media(record.target, "target"):
                    if not name.endswith(".path") and (key := digest(medium)) not in seen:
                        yield key, load_image(medium, task.media_root)
                        seen.add(key)
            except MediaError as error:
                bad = DataError(f"field {name}: {error}")
                rejected.append(rejection(task.span.file, row, bad, values["pair_id"]))

    write_looks(part, images())
    return {"records": 0, "by_source": {}, "rejected": rejected}


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
            here = {"pair_id": filled.pair_id, "part": part.name, "row": writer.rows}
            report["near"] += [{**here, **line} for line in near]
            ids[filled.data_source][kind] += 1
            writer.add(moved)
    return {**report, "records": writer.rows, "by_source": {name: kinds.total() for name, kinds in ids.items()}}


def _filled(
    task: IdTask, record: PairRecord | DataError, digest: Digest, stands_for: dict[bytes, bytes]
) -> tuple[PairRecord, str, list[dict[str, str]]]:
    """The record with its ids, the kind of its target's, and its target's media that have near duplicates."""
    if isinstance(record, DataError):
        raise record
    ids: dict[str, Any] = {}
    kind, near = "given", list[dict[str, str]]()
    for side in filter(functools.partial(task.fills, record), SIDES):
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
        images = len(item.images)
        ids[f"{side}_id"] = stated_content_id(texts, digests[:images], digests[images:])
        if side == "target":
            kind = "near" if near else "media" if digests else "text"
    return replace(record, **ids), kind, near


def _media(item: Item, side: Side) -> Iterator[tuple[str, Media]]:
    """The media of an item with the names of their fields ("target.images[0]"), images before frames."""
    yield from ((f"{side}.images[{index}]", image) for index, image in enumerate(item.images))
    if item.video is not None:
        yield from ((f"{side}.video.frames[{index}]", frame) for index, frame in enumerate(item.video.frames))
        if item.video.path is not None:
            yield f"{side}.video.path", item.video.path


def id_report(values: dict[str, Any]) -> JobReport:
    """The report of `count_ids`, with a table for people."""
    head = ["data source", "pairs", "own id", *KINDS[1:], "targets", "queries", "same", "commonest target"]
    rows = [head]
    for name, source in values["sources"].items():
        first = source["largest"][0]
        common = f"{first['pairs']} x {first['text'] or first['target_id']!r}" if first["pairs"] > 1 else ""
        counts = [source[key] for key in ("pairs", *KINDS, "contents", "queries")]
        rows.append([name, *counts, f"{source['false_negatives']:.2%}", common])
    lines = table(*rows, left=(0, len(head) - 1))
    lines.append(
        "own id, text, media, near: where target ids come from. same: probability that another pair of the source "
        "has the same query or target (never a negative)"
    )
    if values["near_groups"]:
        lines.append(
            f"{values['near_groups']} groups of near-duplicate images with {values['near_media']} target media; look "
            f"at them: {GROUPS_FILE}, and embedrl data show --limit {PAIRS_TO_LOOK_AT} {PAIRS_FILE}"
        )
    return JobReport(values, [*lines, f"{values['rows']} rows read, {values['rejected']} left out"])


def count_ids(parts: Sequence[Path], reports: Sequence[Report]) -> dict[str, Any]:
    """Count what is in written parts; see the module. Memory: 24 bytes a pair."""
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        for name, counts in report["ids"].items():
            kinds[name].update(counts)
    codes = {name: code for code, name in enumerate(sorted(kinds))}
    columns = [np.zeros((3, 0), np.int64)]
    for part in parts:
        for _, batch in read_batches(part, ["data_source", "query_id", "target_id"]):
            names, *ids = (column.to_pylist() for column in batch.columns)
            columns.append(np.array([[codes[name] for name in names], *([*map(hash, side)] for side in ids)]))
    source, query, target = np.concatenate(columns, axis=1)
    sources, shown = dict[str, Any](), dict[int, dict[str, Any]]()
    for name, code in codes.items():
        rows = np.flatnonzero(source == code)
        _, first, repeats = np.unique(target[rows], return_index=True, return_counts=True)
        largest = np.lexsort((first, -repeats))[:LARGEST_SHOWN]
        listed = [{"pairs": pairs, "share": pairs / len(rows)} for pairs in repeats[largest].tolist()]
        shown |= zip(rows[first[largest]].tolist(), listed, strict=True)
        sources[name] = {
            "pairs": len(rows),
            **{kind: kinds[name][kind] for kind in KINDS},
            "contents": len(repeats),
            "queries": len(np.unique(query[rows])),
            "false_negatives": false_negative_share(query[rows], target[rows]),
            "largest": listed,
        }
    start = 0
    for part, report in zip(parts, reports, strict=True):
        numbers = np.array([row - start for row in sorted(shown) if start <= row < start + report["records"]], np.int64)
        for here, batch in read_rows(part, numbers, ["target", "target_id"]):
            for number, found in zip(here.tolist(), batch.to_pylist(), strict=True):
                text = " ".join((found["target"]["text"] or "").split())
                shown[start + number].update(target_id=found["target_id"], text=text[:TEXT_SHOWN])
        start += report["records"]
    near = [line["group"] for report in reports for line in report["near"]]
    totals = {"rows": sum(report["rows"] for report in reports), "near_groups": len({*near}), "near_media": len(near)}
    return {"sources": sources, "rejected": sum(len(report["rejected"]) for report in reports), **totals}


def write_near_duplicates(out: Path, parts: Sequence[Path], reports: Sequence[Report]) -> None:
    """List the largest groups of near-duplicate images in `near_duplicates.jsonl`, and write pairs of them, group by
    group, to `near_duplicates.parquet`, for `embedrl data show`."""
    near = [line for report in reports for line in report["near"]]
    sizes = Counter(line["group"] for line in near)
    largest = sorted(sizes, key=lambda group: (-sizes[group], group))[:GROUPS_LISTED]
    members: dict[str, list[dict[str, Any]]] = {group: [] for group in largest}
    for line in near:
        if len(members.get(line["group"], range(MEMBERS_LISTED))) < MEMBERS_LISTED:
            members[line["group"]].append(line)
    groups = ({"group": group, "media": sizes[group], "members": listed} for group, listed in members.items())
    write_lines(out / GROUPS_FILE, groups)
    places = dict.fromkeys((line["part"], line["row"]) for listed in members.values() for line in listed)
    wanted, pairs = [*places][:PAIRS_TO_LOOK_AT], dict[tuple[str, int], Any]()
    for part in parts:
        numbers = np.array(sorted(row for name, row in wanted if name == part.name), np.int64)
        for here, batch in read_rows(part, numbers):
            pairs |= {(part.name, row): batch.slice(at, 1) for at, row in enumerate(here.tolist())}
    with PairWriter(out / PAIRS_FILE) as writer:
        for place in wanted:
            writer.write(pairs[place])
