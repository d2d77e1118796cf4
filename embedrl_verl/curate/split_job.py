# SPDX-License-Identifier: Apache-2.0
"""`embedrl data split` as a job: data set folders, who went where, and a report.

    OUT/contrastive/   pairs for the Embedder
    OUT/rl/            pairs for the Reasoner
    OUT/holdout/       pairs that share no content with these, if some are held out
    OUT/split.parquet  pair_id, data_source, verdict, fate; rows as in the input
    OUT/split.json     the report

The plan is made again in every run; parts that are written are kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.annotate.verdict_file import VERDICTS
from embedrl_verl.curate.job import JobReport, merged_root, with_prefix
from embedrl_verl.curate.roster import Index, Roster, read_verdicts
from embedrl_verl.curate.split import FATES, REJECTED, SETS, Fates, SplitSettings, decide, split_report
from embedrl_verl.data import build
from embedrl_verl.data.files import (
    REJECTED_FILE,
    disk_errors,
    pair_files,
    publish,
    sha256_of,
    temporary_name,
    write_json,
)
from embedrl_verl.data.parquet import read_rows, record_or_error
from embedrl_verl.data.pool import worker_count
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import ConfigError, DataError

ROWS_PER_PART = 50_000
PartTask: TypeAlias = list[tuple[Path, Index, str | None]]
"""One part: of each file the rows that it holds, and what their media paths get in front."""


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
) -> JobReport:
    """Split the pairs of files and data set folders into a contrastive and an RL set, or go on with that.

    Without `verdicts` (parquet: pair_id, verdict; one row a pair) every pair is a match.
    """
    settings, out = settings or SplitSettings(), Path(out)
    if verdicts is None and settings.rl_from != "all" and settings.holdout is None:
        raise ConfigError(
            f"rl_from {settings.rl_from} needs verdicts; name their file (--verdicts), or draw from all (--rl-from all)"
        )
    files = pair_files(paths)
    root, prefixes = merged_root(files, media_root)
    roster = Roster(files)
    if verdicts is not None:
        read_verdicts(roster, Path(verdicts))
    fates = decide(roster, settings)
    judged_by = {"verdicts": verdicts and sha256_of(Path(verdicts))}
    options = {**asdict(settings), **judged_by, "media_root": root, "rows_per_part": rows_per_part}
    limits: Any = {"workers": worker_count(workers), "max_bad_share": max_bad_share}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        build.stop_if_bad([{"rejected": [*roster.rejected.values()]}], len(roster), max_bad_share, out)
    for name in settings.sets:
        facts = {**build.build_facts("embedrl data split", options, files), "set": name}
        rows = np.flatnonzero(np.isin(fates, SETS[name]))
        tasks = [
            [(file, numbers, prefixes[file]) for file, _, numbers in roster.pieces(rows[start:][:rows_per_part])]
            for start in range(0, max(len(rows), 1), rows_per_part)
        ]
        with build.building(out / name, facts, command, stamps=[file.stat().st_mtime_ns for file in files]) as work:
            if work is not None:
                reports = build.make_parts(write_part, tasks, work, rows=len(rows), label=name, **limits)
                build.finish(out / name, f"{name} set", facts, reports, media_root=root)
        with open(out / name / REJECTED_FILE, encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                row = int(roster.starts[files.index(Path(line["file"]))]) + line["row"]
                roster.good[row], roster.rejected[row] = False, line
    fates[~roster.good] = REJECTED
    report = split_report(roster, fates, settings)
    with disk_errors(out):
        build.write_lines(out / REJECTED_FILE, (line for _, line in sorted(roster.rejected.items())))
        _write_fates(out / "split.parquet", roster, fates)
        write_json(out / "split.json", report.values)
    return report


def write_part(task: PartTask, part: Path) -> build.Report:
    """Write one part. Rows that turn out to be no pairs are left out."""
    report: build.Report = {"rejected": [], "by_source": Counter()}
    with PairWriter(part) as writer:
        for file, numbers, prefix in task:
            for rows, batch in read_rows(file, numbers):
                good = np.ones(len(rows), np.bool_)
                for place, (row, values) in enumerate(zip(rows.tolist(), batch.to_pylist(), strict=True)):
                    record = record_or_error(values, file, row)
                    try:
                        if isinstance(record, DataError):
                            raise record
                        moved = with_prefix(record, prefix)
                    except DataError as error:
                        good[place] = False
                        report["rejected"].append(build.rejection(file, row, error, values["pair_id"]))
                        continue
                    report["by_source"][record.data_source] += 1
                    if prefix != "":
                        writer.add(moved)
                if prefix == "":  # as it is, which is faster
                    writer.write(batch.filter(pa.array(good)))
    return {**report, "records": writer.rows}


def _write_fates(path: Path, roster: Roster, fates: Fates) -> None:
    names = ("pair_id", "data_source", "verdict", "fate")
    codes = (roster.pair, roster.source, roster.verdict, fates)
    words = (roster.ids, pa.array(roster.names, pa.string()), pa.array([*VERDICTS, ""]), pa.array(FATES))
    columns = [
        pa.DictionaryArray.from_arrays(code % max(len(of), 1), of) for code, of in zip(codes, words, strict=True)
    ]  # no verdict is -1, the last word
    temporary = temporary_name(path)
    pq.write_table(pa.table(columns, names), temporary, store_schema=False)
    publish(temporary, path)
