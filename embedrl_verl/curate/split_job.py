# SPDX-License-Identifier: Apache-2.0
"""`embedrl data split` as a job: two data set folders, who went where, and a report.

    OUT/contrastive/   pairs for the Embedder
    OUT/rl/            pairs for the Reasoner
    OUT/split.parquet  pair_id, data_source, verdict, fate; rows as in the input
    OUT/split.json     the report

The plan is made again in every run (it takes seconds for a million pairs); parts that are written are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.curate.content_ids import rejection
from embedrl_verl.curate.folders import (
    bad_rows_watch,
    build_facts,
    finish,
    read_lines,
    stop_if_bad,
    work_in,
    write_lines,
)
from embedrl_verl.curate.jobs import ROWS_PER_PART, Entry, read_entry, rejected_in, run_tasks, worker_count
from embedrl_verl.curate.media_paths import merged_root, with_prefix
from embedrl_verl.curate.records import PartWriter, batches, chosen_batches
from embedrl_verl.curate.roster import NO_VERDICT, Index, Roster, read_roster, read_verdicts
from embedrl_verl.curate.split import BOTH, CONTRASTIVE, FATES, REJECTED, RL, Fates, SplitReport, decide
from embedrl_verl.curate.split_settings import SplitSettings
from embedrl_verl.curate.validity import bad_rows
from embedrl_verl.curate.verdict_file import VERDICTS
from embedrl_verl.data.files import (
    REJECTED_FILE,
    disk_errors,
    pair_files,
    part_facts,
    part_name,
    publish,
    sha256_of,
    temporary_name,
    write_json,
)
from embedrl_verl.errors import ConfigError

REPORT_FILE = "split.json"
FATES_FILE = "split.parquet"
FATES_SCHEMA = pa.schema([(name, pa.string()) for name in ("pair_id", "data_source", "verdict", "fate")])
SETS = {"contrastive": (CONTRASTIVE, BOTH), "rl": (RL, BOTH)}


@dataclass(frozen=True)
class PartTask:
    """One part: the rows of each file that it holds, and what its media paths get in front."""

    part: Path
    rows: tuple[tuple[Path, Index, str], ...]


def split_pairs(
    paths: Sequence[str | Path],
    verdicts: str | Path | None,
    out: str | Path,
    settings: SplitSettings | None = None,
    *,
    media_root: str | None = None,
    workers: int | None = None,
    rows_per_part: int = ROWS_PER_PART,
    max_bad_share: float = 0.01,
    command: Sequence[str] = ("embedrl", "data", "split"),
) -> SplitReport:
    """Split the pairs of files and data set folders into a contrastive and an RL set.

    Args:
        paths: parquet files and data set folders.
        verdicts: parquet file with columns pair_id and verdict, one row for each pair; None = every pair is a match.
        out: folder to write, or to go on with.
        media_root: of all files; None = as their data cards say.
        workers: processes; None = the CPUs.
        rows_per_part: of the written files.
        max_bad_share: share of rows that may be unusable; they are left out and listed in `rejected.jsonl`.
        command: what the user called, noted in the folders.

    Raises:
        ConfigError: settings that contradict each other, or a folder of something else.
        DataError: unreadable files, verdicts that do not fit the data, sources with too few pairs, too many bad rows.
        ResourceError: full disk, killed worker; the same command goes on.
    """
    settings, out = settings or SplitSettings(), Path(out)
    if verdicts is None and settings.rl_from != "all":
        raise ConfigError(
            f"rl_from {settings.rl_from} needs verdicts; name their file (--verdicts), or draw from all (--rl-from all)"
        )
    processes = worker_count(workers)
    files = pair_files(paths)
    root, prefixes = merged_root(files, media_root)
    roster = read_roster(files)
    if verdicts is not None:
        read_verdicts(roster, Path(verdicts))
    fates, report = decide(roster, settings, judged=verdicts is not None)
    judged_by = {"verdicts": verdicts and sha256_of(Path(verdicts))}
    facts = {**settings.as_dict(), **judged_by, "media_root": root, "rows_per_part": rows_per_part}
    build = build_facts("embedrl data split", facts, files)
    rejected = {(line["file"], line["row"]): line for line in roster.rejected}
    stop_if_bad(roster.rejected, len(roster), max_bad_share, out / REJECTED_FILE)
    for name, members in SETS.items():
        rows = np.flatnonzero(np.isin(fates, members))
        with disk_errors(out), work_in(out / name, {**build, "set": name}, files, command) as work:
            if work is not None:
                tasks = _tasks(roster, rows, out / name, prefixes, rows_per_part)
                _write_set(tasks, out / name, name, build, root, work, processes, max_bad_share)
        rejected |= {(line["file"], line["row"]): line for line in read_lines(out / name / REJECTED_FILE)}
    _take_out(roster, fates, report, list(rejected.values()))
    with disk_errors(out):
        write_lines(out / REJECTED_FILE, sorted(rejected.values(), key=lambda line: (line["file"], line["row"])))
        _write_fates(out / FATES_FILE, roster, fates)
        write_json(out / REPORT_FILE, report.as_dict())
    return report


def write_part(task: PartTask) -> Entry:
    """Write one part. Rows that are no pairs are left out.

    Returns:
        written, sources (pairs by data source), rejected (lines of `rejected.jsonl`).
    """
    rejected: list[dict[str, Any]] = []
    sources: dict[str, int] = {}
    with PartWriter(task.part) as writer:
        for file, numbers, prefix in task.rows:
            for rows, batch in chosen_batches(file, numbers):
                errors = bad_rows(batch, file, rows)
                if errors:
                    keep = np.ones(batch.num_rows, np.bool_)
                    keep[list(errors)] = False
                    for index, error in errors.items():
                        pair_id = batch["pair_id"][index].as_py()
                        rejected.append(rejection(file, int(rows[index]), error, pair_id))
                    batch = batch.filter(pa.array(keep))
                for count in batch["data_source"].value_counts().to_pylist():
                    sources[count["values"]] = sources.get(count["values"], 0) + count["counts"]
                writer.write(with_prefix(batch, prefix))
    return {"written": writer.rows, "sources": sources, "rejected": rejected}


def _tasks(roster: Roster, rows: Index, folder: Path, prefixes: dict[Path, str], rows_per_part: int) -> list[PartTask]:
    tasks = []
    for number, start in enumerate(range(0, max(len(rows), 1), rows_per_part)):
        chosen = rows[start : start + rows_per_part]
        borders = np.searchsorted(chosen, roster.starts)
        pieces = [
            (file, chosen[borders[index] : borders[index + 1]] - roster.starts[index], prefixes[file])
            for index, file in enumerate(roster.files)
            if borders[index] < borders[index + 1]
        ]
        tasks.append(PartTask(folder / part_name(number), tuple(pieces)))
    return tasks


def _write_set(
    tasks: Sequence[PartTask],
    folder: Path,
    name: str,
    build: dict[str, Any],
    media_root: str | None,
    work: Path,
    workers: int,
    max_bad_share: float,
) -> None:
    total = sum(len(rows) for task in tasks for _, rows, _ in task.rows)
    journal = work / "parts"
    watch = bad_rows_watch(journal, total, max_bad_share, folder / REJECTED_FILE)
    files = run_tasks(write_part, tasks, journal, workers=workers, label=name, watch=watch)
    entries = [read_entry(file) for file in files]
    write_lines(folder / REJECTED_FILE, rejected_in(journal))
    by_source: dict[str, int] = {}
    for entry in entries:
        for source, count in entry["sources"].items():
            by_source[source] = by_source.get(source, 0) + count
    finish(
        folder,
        f"{name} set",
        {**build, "set": name},
        parts=[part_facts(task.part, entry["written"]) for task, entry in zip(tasks, entries, strict=True)],
        by_source=by_source,
        media_root=media_root,
        rejected=folder / REJECTED_FILE,
    )


def _take_out(roster: Roster, fates: Fates, report: SplitReport, rejected: Sequence[dict[str, Any]]) -> None:
    """Count rows that turned out to be no pairs when they were written."""
    starts = {str(file): int(start) for file, start in zip(roster.files, roster.starts[:-1], strict=True)}
    for line in rejected:
        row = starts[line["file"]] + line["row"]
        if fates[row] == REJECTED:
            continue
        source = report.sources[roster.names[roster.source[row]]]
        source.pairs -= 1
        source.fates[FATES[fates[row]]] -= 1
        if source.verdicts:
            source.verdicts[VERDICTS[roster.verdict[row]]] -= 1
        fates[row] = REJECTED
    report.rejected = len(rejected)


def _write_fates(path: Path, roster: Roster, fates: Fates) -> None:
    names, verdicts = pa.array(FATES), pa.array([*VERDICTS, ""])
    temporary, start = temporary_name(path), 0
    with pq.ParquetWriter(temporary, FATES_SCHEMA, use_dictionary=list(FATES_SCHEMA.names[1:])) as writer:
        for file in roster.files:
            for _, batch in batches(file, ["pair_id", "data_source"]):
                rows = slice(start, start + batch.num_rows)
                verdict = np.where(roster.verdict[rows] == NO_VERDICT, len(VERDICTS), roster.verdict[rows])
                columns = [*batch.columns, verdicts.take(pa.array(verdict)), names.take(pa.array(fates[rows]))]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=FATES_SCHEMA))
                start += batch.num_rows
    publish(temporary, path)
