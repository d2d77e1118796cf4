# SPDX-License-Identifier: Apache-2.0
"""The relevance judge (method section 5): are the T-CoTs of a query and of its target obviously irrelevant to each
other, or in conflict, given the task?

No keeps the pair ("match"), Yes does not ("mismatch"). What names neither, or both, is "unknown" and never counted as
an opinion; so is a pair that lacks a T-CoT.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.annotate.answers import Answers, Entry
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.job import Job, tokens_of
from embedrl_verl.annotate.prompts import TEMPLATES, DrawSettings, Prompt, Question, Sampling, digest
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.annotate.verdict_file import VERDICT_SCHEMA, VERDICTS, Verdict
from embedrl_verl.data.build import finish
from embedrl_verl.data.files import REJECTED_FILE, VERDICTS_FILE, part_facts, publish, temporary_name
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.tables import table
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.tcot.harmless import break_control, break_tags

QUESTION = "relevance"
NO_WORD, NO_TCOT = "names neither word, or both", "no T-CoT"


@dataclass(frozen=True)
class RelevanceStyle:
    """How the judge is asked. `answers_only`: it is shown what stands in a T-CoT's <answer>, on one line; tags named in
    `delimiters` are broken up in what it is shown."""

    template: str
    answers_only: bool
    delimiters: tuple[str, ...]
    yes_word: str
    no_word: str

    def prompt(self, instruction: str, query_tcot: str, target_tcot: str) -> str:
        """The question about two T-CoTs. They, and the instruction, are put in as data."""
        query, target = (parse_tcot(one).answer if self.answers_only else one for one in (query_tcot, target_tcot))
        values = {"instruction": instruction, "query": query, "target": target}
        return TEMPLATES.get_template(self.template).render({k: self._harmless(v) for k, v in values.items()})

    def _harmless(self, text: str) -> str:
        text = " ".join(text.split()) if self.answers_only else text.strip()
        return break_tags(break_control(text), self.delimiters)


STYLES = {
    "paper": RelevanceStyle("relevance_paper.jinja", False, ("query", "target"), "Yes", "No"),
    "compact": RelevanceStyle("relevance_compact.jinja", True, (), "yes", "no"),
}


def read_verdict(text: str, style: RelevanceStyle) -> Verdict:
    """What a reply says: one of the two words, whatever stands around it, and not the other."""
    words = {word.casefold() for word in re.findall(r"\w+", text)}
    says_yes, says_no = style.yes_word.casefold() in words, style.no_word.casefold() in words
    if says_yes == says_no:
        return "unknown"
    return "mismatch" if says_yes else "match"


@dataclass(frozen=True)
class RelevanceSettings(DrawSettings):
    """What changes the verdicts, beside the model. `constrained`: vLLM decodes one of the two words."""

    tries: int = 2
    max_tokens: int = 16
    style: str = "paper"
    constrained: bool = True


@dataclass(frozen=True)
class VerdictJob(Job):
    """See `Job`: one question a pair with both T-CoTs. Of `max_failed_share`, unknown verdicts are the failures."""

    settings: RelevanceSettings
    name = "filter"

    @property
    def style(self) -> RelevanceStyle:
        return STYLES[self.settings.style]

    @property
    def verdicts(self) -> Path:
        """The file that the job writes."""
        return self.out / VERDICTS_FILE

    def described(self) -> dict[str, Any]:
        return {**asdict(self.settings), "template": digest(self.style.template)}

    def names(self, record: PairRecord) -> Sequence[str]:
        return (QUESTION,) if record.query.tcot.strip() and record.target.tcot.strip() else ()

    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        record = question.record
        text = self.style.prompt(record.item("query").instruction, record.query.tcot, record.target.tcot)
        choices = (self.style.yes_word, self.style.no_word) if self.settings.constrained else ()
        sampling = self.settings.sampling(question, redraw=True, choices=choices)
        return Prompt([{"role": "user", "content": text}]), sampling

    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        verdict = read_verdict(reply.text, self.style)
        return {"verdict": verdict, "problems": [NO_WORD] if verdict == "unknown" else []}

    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        by_source, unknown, tokens = defaultdict[str, Counter[str]](Counter), Counter[str](), Counter[str]()
        rejected, temporary = list[Rejection](), temporary_name(self.verdicts)
        with pq.ParquetWriter(temporary, VERDICT_SCHEMA) as writer:
            for span in rows.spans:
                written = []
                for _, record in rows.scan(span):
                    if not isinstance(record, PairRecord):
                        rejected.append(record)
                        continue
                    tries = answers.tries(record.pair_id, QUESTION)
                    last: Entry = tries[-1] if tries else {"cause": NO_TCOT}
                    verdict = last.get("verdict", "unknown")
                    written.append({"pair_id": record.pair_id, "verdict": verdict})
                    by_source[record.data_source][verdict] += 1
                    tokens.update(tokens_of(tries))
                    unknown.update([last["cause"]] if verdict == "unknown" else [])
                writer.write_table(pa.Table.from_pylist(written, schema=VERDICT_SCHEMA))
        publish(temporary, self.verdicts)
        pairs = sum(counts.total() for counts in by_source.values())
        counted = {source: {name: found[name] for name in VERDICTS} for source, found in sorted(by_source.items())}
        report = {"records": pairs, "by_source": {}, "rejected": rejected, "part": part_facts(self.verdicts, pairs)}
        summary = {
            "pairs": pairs,
            "rejected_rows": len(rejected),
            **{name: tokens[name] for name in ("replies", "prompt_tokens", "completion_tokens")},
            **self.how.cost(tokens),
            "unknown_causes": dict(sorted(unknown.items())),
            "by_source": counted,
        }
        more = {"format": "embedrl verdicts 1", "served": served, "by_source": counted, "verdicts": summary}
        return finish(self.out, "relevance verdicts", facts, [report], media_root=None, more=more)

    def report(self, card: Mapping[str, Any]) -> list[str]:
        summary, rows = card["verdicts"], []
        total = {name: sum(found[name] for found in summary["by_source"].values()) for name in VERDICTS}
        for source, found in {**summary["by_source"], "all": total}.items():
            known = found["match"] + found["mismatch"]
            kept = f"{found['match'] / known:.1%}" if known else "-"
            rows.append([source, *found.values(), kept])
        lines = table(["data source", *VERDICTS, "kept"], *rows)
        lines += [f"unknown: {count:,} x {cause}" for cause, count in summary["unknown_causes"].items()]
        lines += [f"cost: {summary['cost']:,.4f}"] if "cost" in summary else []
        if summary["rejected_rows"]:
            lines.append(f"{summary['rejected_rows']:,} rows cannot be used, see {REJECTED_FILE}")
        return lines
