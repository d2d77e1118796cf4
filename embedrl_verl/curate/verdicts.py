# SPDX-License-Identifier: Apache-2.0
"""A relevance verdict for every pair of a data set: asked, journalled, and written as `verdicts.parquet`.

Columns `pair_id` and `verdict` ("match", "mismatch", "unknown"), rows in the order of the input. Killed and started
again, the job goes on where it was (`embedrl_verl.annotate`).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl import __version__
from embedrl_verl.annotate.backends import Backend
from embedrl_verl.annotate.chunks import ChunkedInput
from embedrl_verl.annotate.job import ask_about_all
from embedrl_verl.annotate.journal import Entry, read_journal
from embedrl_verl.annotate.progress import RunnerSettings
from embedrl_verl.annotate.report import Prices
from embedrl_verl.annotate.runner import journal_path
from embedrl_verl.annotate.workfolder import WorkFolder
from embedrl_verl.curate.relevance import RelevanceAsker
from embedrl_verl.curate.verdict_file import VERDICT_SCHEMA, VERDICTS, VERDICTS_FILE
from embedrl_verl.data.files import (
    CARD_FILE,
    REJECTED_FILE,
    disk_errors,
    input_facts,
    publish,
    sha256_of,
    temporary_name,
)
from embedrl_verl.errors import DataError

NO_TCOT = "no T-CoT"


@dataclass(frozen=True)
class VerdictJob:
    """One pass of the judge.

    Attributes:
        files: parquet files of pair records with T-CoTs.
        out: folder to write, for the verdicts alone.
        asker: settings and wording.
        backend: who answers.
        runner: how the run goes; of `max_failed_share`, unknown verdicts are the failures.
        chunk_rows: rows of a journal.
        prices: for the report.
        command: goes on with the job.
    """

    files: Sequence[Path]
    out: Path
    asker: RelevanceAsker
    backend: Backend
    runner: RunnerSettings
    chunk_rows: int = 2048
    prices: Prices = field(default_factory=Prices)
    command: Sequence[str] = ()

    @property
    def verdicts(self) -> Path:
        """The file that the job writes."""
        return self.out / VERDICTS_FILE

    def run(self, say: Callable[[str], None] = print) -> int:
        """Do what is left to do. Returns 0, or 3 if a row of the input cannot be used (see rejected.jsonl)."""
        source = ChunkedInput(self.files, self.chunk_rows)
        settings = {
            "command": "data filter",
            "input": source.fingerprint,
            "chunk_rows": self.chunk_rows,
            **self.asker.described(),
        }
        with WorkFolder(self.out, settings, self.command, results=(VERDICTS_FILE,)) as work:
            if work.is_finished:
                work.check_wanted(self.backend.wanted())
            else:
                ask_about_all(work, source, self.asker, self.backend, self.runner, label="judge", unit="pair")
                with disk_errors(self.out):
                    work.finish(self._write(work, source))
        card = json.loads((self.out / CARD_FILE).read_bytes())
        for line in report_lines(card["verdicts"]):
            say(line)
        return DataError.exit_code if card["verdicts"]["rejected_rows"] else 0

    def _write(self, work: WorkFolder, source: ChunkedInput) -> dict[str, Any]:
        counts = VerdictCounts()
        temporary, rejected = temporary_name(self.verdicts), temporary_name(self.out / REJECTED_FILE)
        for stale in self.out.glob(".*.tmp"):
            stale.unlink()
        with pq.ParquetWriter(temporary, VERDICT_SCHEMA) as writer, open(rejected, "wb") as lines:
            for rows, lost in _verdicts(source, work.path, counts):
                writer.write_table(pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA))
                lines.writelines(lost)
        publish(rejected, self.out / REJECTED_FILE)
        publish(temporary, self.verdicts)
        return {
            "tool": f"embedrl-verl {__version__}: data filter",
            "input": [input_facts(file) for file in self.files],
            "outputs": [{"file": VERDICTS_FILE, "sha256": sha256_of(self.verdicts)}],
            "served": work.known_served(),
            "settings": work.settings,
            "verdicts": counts.summary(self.prices),
        }


class VerdictCounts:
    """Verdicts by source, why some are unknown, tokens."""

    def __init__(self) -> None:
        self.by_source: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.unknown: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    def add(self, source: str, tries: Sequence[Entry]) -> str:
        """Count a pair; returns its verdict."""
        verdict = str(tries[-1]["verdict"]) if tries else "unknown"
        self.by_source[source][verdict] += 1
        if verdict == "unknown":
            self.unknown[tries[-1]["cause"] if tries else NO_TCOT] += 1
        for entry in tries:
            self.totals["replies"] += "out" in entry
            self.totals["prompt_tokens"] += entry.get("in") or 0
            self.totals["completion_tokens"] += entry.get("out") or 0
        return verdict

    def summary(self, prices: Prices) -> dict[str, Any]:
        """JSON values in a fixed order, for the data card."""
        cost = prices.cost(self.totals)
        totals = {name: self.totals[name] for name in ("replies", "prompt_tokens", "completion_tokens")}
        return {
            "pairs": sum(found.total() for found in self.by_source.values()),
            "rejected_rows": self.totals["rejected_rows"],
            **totals,
            **({"cost": round(cost, 6)} if cost is not None else {}),
            "unknown_causes": dict(sorted(self.unknown.items())),
            "by_source": {
                source: {verdict: found[verdict] for verdict in VERDICTS}
                for source, found in sorted(self.by_source.items())
            },
        }


def _verdicts(
    source: ChunkedInput, journals: Path, counts: VerdictCounts
) -> Iterator[tuple[list[dict[str, str]], list[bytes]]]:
    """Of each chunk the rows of the verdict file, and the lines of rows that cannot be used."""
    for chunk, rows in source.read(lambda chunk: True):
        tries: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in read_journal(journal_path(journals, chunk)):
            if "errand" in entry:
                tries[entry["id"]].append(entry)
        found, lost = [], []
        for row in rows:
            if row.record is None:
                counts.totals["rejected_rows"] += 1
                line = {"file": str(row.file), "row": row.row, "field": row.field, "reason": row.reason}
                lost.append(json.dumps({**line, "pair_id": row.pair_id}, ensure_ascii=False).encode() + b"\n")
                continue
            verdict = counts.add(row.record.data_source, tries[row.pair_id])
            found.append({"pair_id": row.pair_id, "verdict": verdict})
        yield found, lost


def report_lines(summary: dict[str, Any]) -> list[str]:
    """The counts for the terminal; the share of matches is of the known verdicts."""
    width = max([len("data source"), *map(len, summary["by_source"])])
    lines = [f"{'data source':{width}}  " + "  ".join(f"{name:>9}" for name in (*VERDICTS, "kept"))]
    total: Counter[str] = Counter()
    for source, found in summary["by_source"].items():
        total.update(found)
        lines.append(_line(source, found, width))
    lines.append(_line("all", total, width))
    lines += [f"unknown: {count:,} x {cause}" for cause, count in summary["unknown_causes"].items()]
    if "cost" in summary:
        lines.append(f"cost: {summary['cost']:,.4f}")
    if summary["rejected_rows"]:
        lines.append(f"{summary['rejected_rows']:,} rows cannot be used, see {REJECTED_FILE}")
    return lines


def _line(name: str, found: Any, width: int) -> str:
    known = found["match"] + found["mismatch"]
    share = f"{found['match'] / known:.1%}" if known else "-"
    return f"{name:{width}}  " + "  ".join(f"{found[verdict]:>9,}" for verdict in VERDICTS) + f"  {share:>9}"
