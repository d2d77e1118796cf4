# SPDX-License-Identifier: Apache-2.0
"""From journals to the annotated data set: parts in the order of the input, `failed.jsonl`, `rejected.jsonl`, counts.

The second pass over the input, a chunk a part. Of each part there is first a file with its counts and lists, then the
part itself under a temporary name, then its real one: a part that is there is complete, and is not made again. Nothing
here depends on when an answer came, so the output of a killed and resumed job is that of an unbroken one.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedrl_verl.annotate.chunks import Chunk, ChunkedInput, Row
from embedrl_verl.annotate.journal import Entry, read_journal
from embedrl_verl.annotate.prompts import gold_answer_of
from embedrl_verl.annotate.replies import rule_of
from embedrl_verl.annotate.runner import journal_path
from embedrl_verl.data.files import REJECTED_FILE, disk_errors, part_name, publish, temporary_name, write_json
from embedrl_verl.data.schema import SIDES, PairRecord, Side, input_kind
from embedrl_verl.data.writer import PairWriter

FAILED_FILE = "failed.jsonl"
Answers = dict[tuple[str, str], list[Entry]]


class PartCounts:
    """Counts of one part, and the lines of its lists.

    Attributes:
        totals: plain counts by name.
        problems: refused replies by rule; `notes`, evidence that does not hold in accepted ones, by rule.
        failed, rejected: lines.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failed: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []

    def as_json(self) -> dict[str, Any]:
        """For the disk."""
        return {
            "totals": self.totals,
            "problems": self.problems,
            "notes": self.notes,
            "sources": self.sources,
            "failed": self.failed,
            "rejected": self.rejected,
        }

    def add(self, found: Mapping[str, Any]) -> None:
        """Add the counts (not the lines) of another part, as JSON."""
        for name in ("totals", "problems", "notes"):
            getattr(self, name).update(found[name])
        for source, counts in found["sources"].items():
            self.sources[source].update(counts)

    def reject(self, row: Row, field: str, reason: str) -> None:
        """A row that cannot be used."""
        self.totals["rejected_rows"] += 1
        entry = {"file": str(row.file), "row": row.row, "field": field, "reason": reason, "pair_id": row.pair_id}
        self.rejected.append(entry)

    def answered(self, tries: list[Entry]) -> None:
        """All tries of one side."""
        last = tries[-1]
        source = self.sources[last["source"]]
        for entry in tries:
            self.problems.update({rule_of(problem) for problem in entry["problems"]} if "out" in entry else ())
            for count in (self.totals, source):
                count["replies"] += "out" in entry
                count["prompt_tokens"] += entry.get("in") or 0
                count["completion_tokens"] += entry.get("out") or 0
                count["replies_without_usage"] += "out" in entry and entry["out"] is None
        self.notes.update({rule_of(note) for note in last.get("notes", ())})
        for count in (self.totals, source):
            count["sides_with_tcot" if last["ok"] else "sides_failed"] += 1
            count["sides_asked_again"] += len(tries) > 1
            count["sides_with_gold"] += bool(last.get("gold"))


def assemble(
    source: ChunkedInput,
    journals: Path,
    out: Path,
    *,
    keep_failed: bool,
    report: Callable[[int], None] = lambda rows: None,
) -> PartCounts:
    """Write what is missing of parts and lists. Returns the counts over all parts, without lines.

    Args:
        source: the input.
        journals: folder of the complete journals; the counts of parts go there too.
        out: the data set folder.
        keep_failed: records whose T-CoT failed are written, without it; else they are in `failed.jsonl` alone.
        report: called with the rows done.

    Raises:
        DataError: the input, or a journal, cannot be read.
        ResourceError: the disk is full or cannot be written; parts that are finished are kept.
    """
    with disk_errors(out):
        return _assemble(source, journals, out, keep_failed, report)


def _assemble(
    source: ChunkedInput, journals: Path, out: Path, keep_failed: bool, report: Callable[[int], None]
) -> PartCounts:
    for stale in out.glob(".*.tmp"):  # of a process that was killed; the folder is locked
        stale.unlink()
    made = {chunk.number for chunk in source.chunks if (out / part_name(chunk.number)).is_file()}
    for chunk, rows in source.read(lambda chunk: chunk.number not in made):
        counts = PartCounts()
        answers = _answers(read_journal(journal_path(journals, chunk)))
        target = out / part_name(chunk.number)
        temporary = temporary_name(target)
        try:
            with PairWriter(temporary) as writer:
                for record in _annotated(rows, answers, counts, keep_failed):
                    writer.add(record)
            write_json(_counts_path(journals, chunk), counts.as_json())
            publish(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        report(chunk.rows)
    total = PartCounts()
    lists = {"failed": temporary_name(out / FAILED_FILE), "rejected": temporary_name(out / REJECTED_FILE)}
    with open(lists["failed"], "wb") as failed, open(lists["rejected"], "wb") as rejected:
        for chunk in source.chunks:
            found = json.loads(_counts_path(journals, chunk).read_bytes())
            total.add(found)
            for name, file in (("failed", failed), ("rejected", rejected)):
                file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in found[name])
    publish(lists["failed"], out / FAILED_FILE)
    publish(lists["rejected"], out / REJECTED_FILE)
    return total


def _annotated(rows: Iterator[Row], answers: Answers, counts: PartCounts, keep_failed: bool) -> Iterator[PairRecord]:
    for row in rows:
        counts.totals["input_rows"] += 1
        if row.record is None:
            counts.reject(row, row.field, row.reason)
            continue
        record = row.record
        lasts = {side: answers.get((record.pair_id, side)) for side in SIDES}
        rejected = [found[-1] for found in lasts.values() if found and "rejected" in found[-1]]
        if rejected:
            counts.reject(row, rejected[0]["rejected"]["field"], rejected[0]["rejected"]["reason"])
            continue
        is_good = True
        for side, found in lasts.items():
            if found is None:
                counts.totals["sides_not_asked"] += 1
                continue
            counts.answered(found)
            counts.totals["sides_that_could_be_told"] += gold_answer_of(record, side) is not None
            if not found[-1]["ok"]:
                is_good = False
                counts.failed.append(_failed_line(row, side, found))
            record = with_tcot(record, side, found[-1]["text"] if found[-1]["ok"] else "")
        if is_good or keep_failed:
            counts.totals["pairs"] += 1
            counts.sources[record.data_source]["pairs"] += 1
            kinds = f"{input_kind(record, 'query')} > {input_kind(record, 'target')}"
            counts.sources[record.data_source][f"kind {kinds}"] += 1
            yield record


def with_tcot(record: PairRecord, side: Side, tcot: str) -> PairRecord:
    """The record with another T-CoT on a side."""
    if side == "query":
        return replace(record, query=replace(record.query, tcot=tcot))
    return replace(record, target=replace(record.target, tcot=tcot))


def _failed_line(row: Row, side: Side, tries: list[Entry]) -> dict[str, Any]:
    last = tries[-1]
    return {
        "pair_id": row.pair_id,
        "side": side,
        "file": str(row.file),
        "row": row.row,
        "tries": len(tries),
        "cause": last["cause"],
        "problems": last["problems"],
        "text": last["text"],
    }


def _answers(entries: list[Entry]) -> Answers:
    found: Answers = defaultdict(list)
    for entry in entries:
        if "errand" in entry:
            found[entry["id"], entry["errand"]].append(entry)
    return found


def _counts_path(journals: Path, chunk: Chunk) -> Path:
    return journals / f"counts-{chunk.number:05d}.json"
