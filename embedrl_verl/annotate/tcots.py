# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as a function: a T-CoT for each side of a pair, then the records with their T-CoTs.

Nothing of the output depends on when an answer came. What has no T-CoT is in `failed.jsonl`, counted by problem.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from embedrl_verl.annotate.answers import Answers, Entry
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.job import Job, tokens_of
from embedrl_verl.annotate.prompts import (
    DrawSettings,
    Prompt,
    Question,
    Sampling,
    TcotPrompts,
    again,
    digest,
    gold_answer_of,
    is_in_share,
)
from embedrl_verl.annotate.replies import EvidenceLevel, check_tcot, rule_of
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.data.build import Report, finish, make_parts, write_lines
from embedrl_verl.data.parquet import Span
from embedrl_verl.data.schema import SIDES, PairRecord, Side
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError
from embedrl_verl.tables import table
from embedrl_verl.tcot.prompts import style_words

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
COUNTS = (*COLUMNS, "sides_that_could_be_told", "replies", "replies_without_usage")


@dataclass(frozen=True)
class TcotSettings(DrawSettings):
    """What changes the answers, beside the questions' wording (`TcotPrompts`) and the model. `reask`: "explain" or
    "resample"."""

    sides: tuple[Side, ...] = SIDES
    overwrite: bool = False
    reask: str = "explain"
    top_p: float = 1.0
    evidence: EvidenceLevel = "usable"
    gold_share: float = 0.0


@dataclass(frozen=True)
class AnnotateJob(Job):
    """See `Job`; a question's name is its side. `keep_failed`: records whose T-CoT failed are written, without it."""

    settings: TcotSettings
    prompts: TcotPrompts = field(kw_only=True)
    keep_failed: bool = False
    name = "annotate"

    def described(self) -> dict[str, Any]:
        words = digest("again.jinja", words=style_words(self.prompts.style))
        output = {"rows_per_part": self.rows_per_part, "keep_failed": self.keep_failed}
        return {**output, **asdict(self.settings), "prompts": {**asdict(self.prompts), "templates": words}}

    def names(self, record: PairRecord) -> Sequence[Side]:
        return [side for side in self.settings.sides if self.settings.overwrite or not record.item(side).tcot]

    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        side, tries, redraw = cast(Side, question.name), question.tries, self.settings.reask == "resample"
        prompt = self.prompts.prompt(question.record, side, self.told(question.record, side))
        if tries and not redraw:
            prompt = again(prompt, tries[-1]["text"], tries[-1]["problems"])
        return prompt, self.settings.sampling(question, redraw=redraw, top_p=self.settings.top_p)

    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        family, level = self.prompts.family, self.settings.evidence
        return {"problems": check_tcot(reply, question.record, cast(Side, question.name), prompt, family, level)}

    def told(self, record: PairRecord, side: Side) -> str | None:
        """The answer that is told for a side. Rows are drawn by a hash of seed and pair id."""
        told = is_in_share(self.settings.gold_share, self.settings.seed, "gold", record.pair_id)
        return gold_answer_of(record, side) if told else None

    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        reports = make_parts(
            lambda span, part: self._write_part(rows, answers, span, part),
            rows.spans,
            work,
            rows=rows.count,
            workers=1,  # a part is reading and writing
            max_bad_share=self.how.max_rejected_share,
            label="write",
        )
        write_lines(self.out / FAILED_FILE, _failed_lines(rows, reports, answers))
        if not any(report["records"] for report in reports):
            raise DataError(f"{self.out}: no pair is left; see {FAILED_FILE} and rejected.jsonl there")
        counts, problems, totals = defaultdict[str, Counter[str]](Counter), Counter[str](), Counter[str]()
        for report in reports:
            problems.update(report["problems"])
            for source, found in report["counts"].items():
                counts[source].update(found)
                totals.update(found)
        annotation = {
            "input_rows": rows.count,
            "rejected_rows": sum(len(report["rejected"]) for report in reports),
            **{name: totals[name] for name in COUNTS},
            **self.how.cost(totals),
            "refused_replies": dict(problems.most_common()),
            "by_source": {source: {name: counts[source][name] for name in COUNTS} for source in sorted(counts)},
        }
        root, share = self.prompts.media_root, self.settings.gold_share
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
        by_source, problems, counts = Counter[str](), Counter[str](), defaultdict[str, Counter[str]](Counter)
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
                for side, found in tries.items():
                    is_ok = found[-1]["ok"]
                    count["sides_with_tcot" if is_ok else "sides_failed"] += 1
                    count["sides_asked_again"] += len(found) > 1
                    count["sides_with_gold"] += self.told(record, side) is not None
                    count["sides_that_could_be_told"] += gold_answer_of(record, side) is not None
                    for entry in found:
                        problems.update(sorted({rule_of(one) for one in entry["problems"]}) if "out" in entry else ())
                    item = replace(getattr(record, side), tcot=found[-1]["text"] if is_ok else "")
                    record = replace(record, **{side: item})
                    lost += [] if is_ok else [(record.pair_id, side, row)]
                failed += lost
                if not lost or self.keep_failed:
                    count["pairs"] += 1
                    by_source[record.data_source] += 1
                    writer.add(record)
        facts = {"counts": counts, "problems": problems, "failed": failed}
        return {"records": writer.rows, "by_source": by_source, "rejected": rejected, **facts}


def _lines(found: Mapping[str, Any]) -> list[str]:
    """The counts for people."""
    sources = {**found["by_source"], "all": found}
    rows = [[source, *(counts[name] for name in COLUMNS)] for source, counts in sources.items()]
    lines = table(["data source", *COLUMNS.values()], *rows)
    lines += [f"cost: {found['cost']:,.4f}"] if "cost" in found else []
    if unknown := found["replies_without_usage"]:
        lines.append(f"{unknown:,} replies came without token counts; tokens are those of the rest")
    lines += [f"refused replies: {count:,} x {rule}" for rule, count in [*found["refused_replies"].items()][:8]]
    if rejected := found["rejected_rows"]:
        lines.append(f"{rejected:,} rows cannot be used, see rejected.jsonl")
    return lines


def _failed_lines(rows: Rows, reports: Iterable[Report], answers: Answers) -> Iterator[dict[str, Any]]:
    for span, report in zip(rows.spans, reports, strict=True):
        for pair_id, side, row in report["failed"]:
            tries = answers.tries(pair_id, side)
            last = {name: tries[-1][name] for name in ("cause", "problems", "text")}
            yield {"pair_id": pair_id, "side": side, "file": str(span.file), "row": row, "tries": len(tries), **last}
