# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as a function: ask about all sides, then write the records with their T-CoTs.

Nothing of the output depends on when an answer came. What has no T-CoT is in `failed.jsonl`, counted by problem.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.job import Job, tokens_of
from embedrl_verl.annotate.prompts import gold_answer_of
from embedrl_verl.annotate.replies import rule_of
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.annotate.tcots import TcotQuestions
from embedrl_verl.data.build import Report, finish, make_parts, write_lines
from embedrl_verl.data.parquet import Span
from embedrl_verl.data.schema import SIDES, PairRecord, input_kind
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError
from embedrl_verl.tables import table

FAILED_FILE = "failed.jsonl"
COLUMNS = {
    "pairs": "pairs",
    "sides_with_tcot": "T-CoTs",
    "sides_failed": "failed",
    "sides_asked_again": "asked again",
    "sides_with_gold": "gold told",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "reply tokens",
}


@dataclass(frozen=True)
class AnnotateJob(Job):
    """See `Job`. `keep_failed`: records whose T-CoT failed are written, without it."""

    questions: TcotQuestions
    keep_failed: bool = False
    name = "annotate"

    def settings(self) -> dict[str, Any]:
        return {"rows_per_part": self.rows_per_part, "keep_failed": self.keep_failed, **super().settings()}

    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        reports = make_parts(
            lambda span, part: self._write_part(rows, answers, span, part),
            rows.spans,
            work,
            rows=rows.count,
            workers=1,  # a part is reading and writing
            max_bad_share=self.runner.max_rejected_share,
            label="write",
        )
        write_lines(self.out / FAILED_FILE, _failed_lines(rows, reports, answers))
        if not any(report["records"] for report in reports):
            raise DataError(f"{self.out}: no pair is left; see {FAILED_FILE} and rejected.jsonl there")
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        problems, notes = Counter[str](), Counter[str]()
        totals = Counter(input_rows=rows.count, rejected_rows=sum(len(report["rejected"]) for report in reports))
        for report in reports:
            problems.update(report["problems"])
            notes.update(report["notes"])
            for source, found in report["counts"].items():
                counts[source].update(found)
                totals.update(found)
        annotation = {
            **dict(sorted(totals.items())),
            **self.prices.cost(totals),
            "refused_replies": dict(problems.most_common()),
            "evidence_notes": dict(notes.most_common()),
            "by_source": {source: dict(sorted(found.items())) for source, found in sorted(counts.items())},
        }
        root, share = self.questions.prompts.media_root, self.questions.settings.gold_share
        by = f"T-CoTs by {served.get('model')}; the answer was told for {share:.2%} of the queries with a text target."
        return finish(
            self.out,
            "annotated pairs",
            facts,
            reports,
            media_root=os.path.relpath(Path(root).resolve(), self.out.resolve()) if root else None,
            more={"served": served, "annotation": annotation},
            notes=[by, "", "```", *_lines(annotation), "```"],
        )

    def report(self, card: Mapping[str, Any]) -> list[str]:
        done = f"wrote {card['records']:,} of {card['annotation']['input_rows']:,} pairs to {self.out}"
        return [*_lines(card["annotation"]), done]

    def _write_part(self, rows: Rows, answers: Answers, span: Span, part: Path) -> Report:
        by_source, counts = Counter[str](), defaultdict[str, Counter[str]](Counter)
        problems, notes = Counter[str](), Counter[str]()
        failed, rejected = list[tuple[str, str, int]](), list[Rejection]()
        with PairWriter(part) as writer:
            for row, record in rows.scan(span):
                if not isinstance(record, PairRecord):
                    rejected.append(record)
                    continue
                tries = {side: found for side in SIDES if (found := answers.tries(record.pair_id, side))}
                count, lost = counts[record.data_source], []
                for found in tries.values():
                    count.update(tokens_of(found))
                if bad := [found[-1]["rejected"] for found in tries.values() if "rejected" in found[-1]]:
                    rejected.append(bad[0])
                    continue
                count["sides_not_asked"] += len(SIDES) - len(tries)
                for side, found in tries.items():
                    replies, is_ok = [entry for entry in found if "out" in entry], found[-1]["ok"]
                    count["replies_without_usage"] += sum(entry["out"] is None for entry in replies)
                    count["sides_with_tcot" if is_ok else "sides_failed"] += 1
                    count["sides_asked_again"] += len(found) > 1
                    count["sides_with_gold"] += self.questions.told(record, side) is not None
                    count["sides_that_could_be_told"] += gold_answer_of(record, side) is not None
                    problems.update(rule for entry in replies for rule in sorted(set(map(rule_of, entry["problems"]))))
                    notes.update(sorted(set(map(rule_of, found[-1].get("notes", ())))))
                    item = replace(getattr(record, side), tcot=found[-1]["text"] if is_ok else "")
                    record = replace(record, **{side: item})
                    lost += [] if is_ok else [(record.pair_id, side, row)]
                failed += lost
                if not lost or self.keep_failed:
                    kinds = f"{input_kind(record, 'query')} > {input_kind(record, 'target')}"
                    count.update({"pairs": 1, f"kind {kinds}": 1})
                    by_source[record.data_source] += 1
                    writer.add(record)
        more = {"counts": counts, "problems": problems, "notes": notes, "failed": failed}
        return {"records": writer.rows, "by_source": by_source, "rejected": rejected, **more}


def _lines(found: Mapping[str, Any]) -> list[str]:
    """The counts for people."""
    sources = {**found["by_source"], "all": found}
    rows = [[source, *(counts.get(name, 0) for name in COLUMNS)] for source, counts in sources.items()]
    lines = table(["data source", *COLUMNS.values()], *rows)
    lines += [f"cost: {found['cost']:,.4f}"] if "cost" in found else []
    if unknown := found.get("replies_without_usage"):
        lines.append(f"{unknown:,} replies came without token counts; tokens are those of the rest")
    for title, key in (("refused replies", "refused_replies"), ("evidence that was let through", "evidence_notes")):
        lines += [f"{title}: {count:,} x {rule}" for rule, count in [*found[key].items()][:8]]
    if rejected := found["rejected_rows"]:
        lines.append(f"{rejected:,} rows cannot be used, see rejected.jsonl")
    return lines


def _failed_lines(rows: Rows, reports: Iterable[Report], answers: Answers) -> Iterator[dict[str, Any]]:
    for span, report in zip(rows.spans, reports, strict=True):
        for pair_id, side, row in report["failed"]:
            tries = answers.tries(pair_id, side)
            last = {name: tries[-1][name] for name in ("cause", "problems", "text")}
            yield {"pair_id": pair_id, "side": side, "file": str(span.file), "row": row, "tries": len(tries), **last}
