# SPDX-License-Identifier: Apache-2.0
"""A conversion from start to end: plan, parts in worker processes, ids that come twice, publication, data card.

1. The plan is written to `_work/plan.json`. A later start with another plan is refused, with the same it goes on.
2. Workers make the parts in `_work/`; a part with its counts is finished and never made again.
3. Records with the id of an earlier record are found over all parts, and the parts that hold them made again without.
4. Parts get their final names, then `rejected.jsonl` and the data card are written, then `_work/` goes.

So after kill -9 at any point the same command gives the same files as an unbroken run. The rows that cannot be used are
counted against the rows of the whole plan: above `max_bad_share` the job stops, whatever the order of the workers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from embedrl_verl.convert.card import (
    CARD_TEXT_FILE,
    card_text,
    count_causes,
    describe_rejected,
    difference,
    make_card,
    same_build,
)
from embedrl_verl.convert.converter import Converter
from embedrl_verl.convert.doubles import find_doubles
from embedrl_verl.convert.inputs import Root
from embedrl_verl.convert.media_store import MediaStore
from embedrl_verl.convert.parts import PartJob, convert_part, rejected_entry
from embedrl_verl.convert.plan import PLAN_FILE, Plan, Unit, build_facts, make_plan
from embedrl_verl.convert.restart import check_media_folder, earlier_conversion, remove_earlier
from embedrl_verl.convert.sampling import Sampling
from embedrl_verl.data.files import (
    CARD_FILE,
    MEDIA_FOLDER,
    REJECTED_FILE,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    only_writer,
    part_name,
    publish,
    read_object,
    temporary_name,
    write_atomically,
    write_json,
)
from embedrl_verl.data.pool import run_tasks
from embedrl_verl.errors import ConfigError, DataError

DOUBLES_FILE = "doubles.json"
GONE_FOLDER = "._work_done"
EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class JobOptions:
    """How to convert.

    Attributes:
        out: data set folder.
        media_root: folder that the converter's media paths are relative to; None: a local input folder.
        place, verify: see `media_store`.
        workers: processes.
        shard_rows: input rows of a part at most.
        max_bad_share: rows that cannot be used, or files that cannot be read to their end, as a share of all, above
            which the job stops.
        command: what finishes the job after a crash.
        licence: overrides the converter's.
        restart: remove what an earlier conversion has written to `out`, nothing else, and begin anew.
    """

    out: str
    media_root: str | None = None
    place: str = "keep"
    verify: str = "decode"
    workers: int = 1
    shard_rows: int = 5_000
    max_bad_share: float = 0.01
    sampling: Sampling = field(default_factory=Sampling)
    command: Sequence[str] = ()
    licence: str = ""
    restart: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1; got {self.workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"the share of bad rows must be between 0 and 1; got {self.max_bad_share}")


def run_conversion(root: Root, converter: Converter, options: JobOptions) -> dict[str, Any]:
    """Make a data set folder, or go on with one. Returns its data card.

    Raises:
        ConfigError: options that cannot work, or a folder that was begun, or made, with others or by another command.
        DataError: nothing to read, or too many bad rows; the message has the causes.
        ResourceError: full disk, killed worker, silent hub; the same command goes on.
    """
    out = Path(options.out)
    media_root = options.media_root or (str(_folder_of(root)) if not root.is_remote else None)
    if media_root is not None and not Path(media_root).expanduser().is_dir():
        raise ConfigError(f"the media root {media_root} is no folder; --media-root names the one that paths start from")
    store = MediaStore(options.place, options.verify, media_root, out)
    plan = make_plan(root, converter, options.sampling, options.shard_rows)
    media = {"place": options.place, "verify": options.verify, "given_root": media_root}
    licence = options.licence or converter.licence
    build = json.loads(json.dumps(build_facts(root, converter, options.sampling, plan, media, licence)))
    shutil.rmtree(out / GONE_FOLDER, ignore_errors=True)
    earlier = earlier_conversion(out)
    check_media_folder(out, options.place, earlier)
    if earlier is not None and (options.restart or earlier.is_going):
        remove_earlier(out, earlier, _read_by(root, plan, media_root), options.command)
    elif (out / CARD_FILE).is_file() and not (out / WORK_FOLDER).exists():
        return _finished_card(out, build, root, options.workers)
    work = begin_work(out, options.command)
    with disk_errors(out), only_writer(out):
        _same_plan(work, build, {name: root.stamp(name) for name in plan.files})
        _remove_temporary(out, options.place)
        job = _Job(plan, PartJob(root, converter, store, work), out, options)
        reports, hashes = job.make_parts()
        job.publish_parts()
        job.write_rejected()
        root_in_card = MEDIA_FOLDER if options.place == "files" else media_root and os.path.abspath(media_root)
        card = make_card(
            build=build,
            media_root=root_in_card,
            plan=plan,
            reports=reports,
            hashes=hashes,
            rejected=job.rejected(),
        )
        _remove_temporary(out, options.place)
        write_atomically(out / CARD_TEXT_FILE, card_text(card))
        write_json(out / CARD_FILE, card)
        os.replace(work, out / GONE_FOLDER)
    shutil.rmtree(out / GONE_FOLDER)
    return card


class _Job:
    """The steps of a conversion between its plan and its data card."""

    def __init__(self, plan: Plan, parts: PartJob, out: Path, options: JobOptions) -> None:
        self.plan, self.parts, self.out, self.options = plan, parts, out, options
        self.units = {unit.index: unit for unit in plan.units()}
        self.reports: dict[int, dict[str, Any]] = {}
        self.hashes: dict[str, str | None] = {}

    def make_parts(self) -> tuple[dict[int, dict[str, Any]], dict[str, str | None]]:
        """All parts with their counts, and the hashes of the input files; what is there already is not made again."""
        self._stop_if_files_are_bad()
        for index in self.units:
            report = _read_json(self.parts.file(index, ".json"))
            if report is not None and (self._part(index).is_file() or (self.out / part_name(index)).is_file()):
                self.reports[index] = report
        for number, name in enumerate(self.plan.files):
            saved = _read_json(self._hash_file(number))
            if saved is not None:
                self.hashes[name] = saved["sha256"]
        self._stop_if_rows_are_bad()
        self._run([*self._missing_hashes(), *(index for index in self.units if index not in self.reports)])
        doubles = self._doubles()
        again = [index for index in doubles if self.reports[index]["doubles"] != len(doubles[index])]
        self._run(again, doubles)
        self._stop_if_rows_are_bad()
        if sum(report["records"] for report in self.reports.values()) == 0:
            raise DataError(
                self._causes(f"{self.parts.root.location}: no pair could be made of {self.plan.total} rows")
            )
        return self.reports, self.hashes

    def publish_parts(self) -> None:
        """Give the finished parts their final names."""
        for index in self.units:
            if self._part(index).is_file():
                os.replace(self._part(index), self.out / part_name(index))

    def write_rejected(self) -> None:
        """`rejected.jsonl`: damaged files, then rows in the order of the parts."""
        target = self.out / REJECTED_FILE
        temporary = temporary_name(target)
        with open(temporary, "w", encoding="utf-8") as file:
            for entry in self.rejected():
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        publish(temporary, target)

    def rejected(self) -> Iterator[dict[str, Any]]:
        """All entries of `rejected.jsonl` so far."""
        for name, fault in self.plan.faults.items():
            yield rejected_entry(name, None, "", fault)
        for index in self.units:
            if self.reports.get(index, {}).get("rejected"):
                with open(self.parts.file(index, ".rejected.jsonl"), encoding="utf-8") as file:
                    yield from map(json.loads, file)

    def _run(self, tasks: Sequence[str | int], doubles: Mapping[int, Mapping[int, str]] | None = None) -> None:
        units = (task if isinstance(task, str) else (self.units[task], (doubles or {}).get(task, {})) for task in tasks)
        parts = [task for task in tasks if not isinstance(task, str)]
        rows = sum(self.units[part].count for part in parts)
        workers = min(self.options.workers, max(len(parts), 1))
        bar = tqdm(
            desc=self.parts.converter.name,
            total=self.plan.total,
            initial=self.plan.total - rows,
            unit="row",
            disable=None,
        )
        with bar:
            for result in run_tasks(_make, self.parts, iter(units), workers):
                if isinstance(result, tuple):
                    name, digest = result
                    self.hashes[name] = digest
                    write_json(self._hash_file(self.plan.files.index(name)), {"file": name, "sha256": digest})
                    continue
                index = result.pop("part")
                self.reports[index] = result
                bar.update(self.units[index].count)
                if bar.disable:
                    self._log(index)
                self._stop_if_rows_are_bad()

    def _log(self, index: int) -> None:
        unit, report = self.units[index], self.reports[index]
        print(
            f"part {index + 1} of {len(self.units)}: {unit.shard.file}, {report['records']} pairs of "
            f"{report['rows']} rows, {report['rejected']} rejected",
            file=sys.stderr,
            flush=True,
        )

    def _doubles(self) -> dict[int, dict[int, str]]:
        """See `find_doubles`; kept in the work folder, because it can only be asked while all parts are there."""
        file = self.parts.work / DOUBLES_FILE
        saved = _read_json(file)
        if saved is None:
            allowed = int(self.options.max_bad_share * self.plan.total)
            sizes = [self.reports[index]["records"] for index in self.units]
            found = find_doubles(self.parts, self.units, sizes, limit=allowed)
            count = sum(map(len, found.values()))
            if count > allowed:
                part = min(found)
                number = min(found[part])
                row = int(np.load(self.parts.file(part, ".rows.npy"))[number])
                entry = rejected_entry(self.units[part].shard.file, row, "pair_id", found[part][number])
                raise DataError(
                    f"more than {allowed} of {self.plan.total} rows have the pair_id of an earlier row, over the limit "
                    f"of {self.options.max_bad_share:.2%}; the first: {describe_rejected(entry)}. Make ids unique, or "
                    "leave them out and rows are numbered; or raise --max-bad-share to keep the first of each"
                )
            saved = {str(part): {str(number): why for number, why in rows.items()} for part, rows in found.items()}
            write_json(file, saved)
        return {int(part): {int(number): why for number, why in rows.items()} for part, rows in saved.items()}

    def _stop_if_files_are_bad(self) -> None:
        faults = self.plan.faults
        if len(faults) > self.options.max_bad_share * len(self.plan.files):
            listed = "\n".join(f"  {name}: {fault}" for name, fault in list(faults.items())[:EXAMPLES_SHOWN])
            raise DataError(
                f"{len(faults)} of {len(self.plan.files)} files cannot be read to their end, over the limit of "
                f"{self.options.max_bad_share:.2%}:\n{listed}\nMend them, and start again with --restart. Or go on "
                "without the rows that are lost: the same command with a higher --max-bad-share"
            )

    def _stop_if_rows_are_bad(self) -> None:
        bad = sum(report["rejected"] for report in self.reports.values())
        if bad <= self.options.max_bad_share * self.plan.total:
            return
        limit = f"{self.options.max_bad_share:.2%}"
        raise DataError(
            self._causes(f"{bad} of {self.plan.total} rows cannot be used, over the limit of {limit}")
            + ". Or go on without these rows: the same command with a higher --max-bad-share keeps the finished parts"
        )

    def _causes(self, what: str) -> str:
        """A message of what went wrong, why, and what to do; `rejected.jsonl` is written."""
        self.write_rejected()
        causes, examples = count_causes(self.rejected())
        listed = [f"  {count} x {cause}" for cause, count in causes.most_common(EXAMPLES_SHOWN)]
        firsts = [f"  {examples[cause]}" for cause, _ in causes.most_common(EXAMPLES_SHOWN)]
        if not causes:
            return f"{what}: the converter uses none of them. Look at its options, and start again with --restart"
        lines = [f"{what}. Causes:", *listed, "The first of each:", *firsts]
        return "\n".join(lines) + (
            f"\n{self.out / REJECTED_FILE} has all that were found so far. Mend the input or the options, and start "
            "again with --restart"
        )

    def _part(self, index: int) -> Path:
        return self.parts.file(index, ".parquet")

    def _hash_file(self, number: int) -> Path:
        return self.parts.work / f"input-{number:05d}.json"

    def _missing_hashes(self) -> list[str]:
        return [name for name in self.plan.files if name not in self.hashes]


def _make(job: PartJob, task: str | tuple[Unit, Mapping[int, str]]) -> dict[str, Any] | tuple[str, str | None]:
    """In a worker: a part, or the hash of an input file."""
    if isinstance(task, str):
        return task, job.root.sha256(task)
    unit, doubles = task
    return {"part": unit.index, **convert_part(job, unit, doubles)}


def _finished_card(out: Path, build: dict[str, Any], root: Root, workers: int) -> dict[str, Any]:
    card = read_object(out / CARD_FILE)
    changed = same_build(card, build) or _changed_file(card, root, workers)
    if changed:
        raise ConfigError(f"{out} was made with other options or input: {changed}; name another folder, or --restart")
    return card


def _changed_file(card: Mapping[str, Any], root: Root, workers: int) -> str:
    """The first input file whose content is not that of the data card; "" without one. What is remote is pinned to a
    commit, which `same_build` compares."""
    if root.is_remote:
        return ""
    files = card["input"]["files"]
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(root.sha256, [file["file"] for file in files])
        for file, digest in zip(files, hashes, strict=True):
            if digest != file["sha256"]:
                return f"the SHA-256 of {file['file']} was {file['sha256']}, is {digest}"
    return ""


def _same_plan(work: Path, build: dict[str, Any], stamps: dict[str, str]) -> None:
    now = {**build, "stamps": stamps}
    before = _read_json(work / PLAN_FILE)
    if before is None:
        write_json(work / PLAN_FILE, now)
    elif changed := difference(before, now):
        raise ConfigError(
            f"{work.parent} was begun with other options or input: {changed}. Finish it with the same, or remove the "
            "folder (--restart) to start again"
        )


def _folder_of(root: Root) -> Path:
    folder = root.local_path(".")
    assert folder is not None
    return folder


def _read_by(root: Root, plan: Plan, media_root: str | None) -> list[Path]:
    """Files and folders on this machine that a conversion reads."""
    files = [path for name in plan.files if (path := root.local_path(name)) is not None]
    return files if media_root is None else [*files, Path(media_root)]


def _remove_temporary(out: Path, place: str) -> None:
    """What a killed run has left half-written."""
    found = [path for name in (CARD_FILE, CARD_TEXT_FILE, REJECTED_FILE) for path in out.glob(f".{name}.*.tmp")]
    found += (out / WORK_FOLDER).glob(".*.tmp")
    if place == "files":
        found += (out / MEDIA_FOLDER).glob("*/.*.tmp")
    for path in found:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None
