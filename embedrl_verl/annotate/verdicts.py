# SPDX-License-Identifier: Apache-2.0
"""`verdicts.parquet`: a relevance verdict for every pair of a data set, asked and written in the order of the input."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.job import Job, tokens_of
from embedrl_verl.annotate.relevance import QUESTION, RelevanceQuestions
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.annotate.verdict_file import VERDICT_SCHEMA, VERDICTS, VERDICTS_FILE
from embedrl_verl.data.build import finish
from embedrl_verl.data.files import CARD_FILE, REJECTED_FILE, WORK_FOLDER, part_facts, publish, temporary_name
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import ConfigError

NO_TCOT = "no T-CoT"


@dataclass(frozen=True)
class VerdictJob(Job):
    """See `Job`; of the runner's `max_failed_share`, unknown verdicts are the failures."""

    questions: RelevanceQuestions
    name = "filter"

    @property
    def verdicts(self) -> Path:
        """The file that the job writes."""
        return self.out / VERDICTS_FILE

    def run(self, say: Callable[[str], None] = print) -> int:
        if self.verdicts.exists() and not any((self.out / name).exists() for name in (CARD_FILE, WORK_FOLDER)):
            raise ConfigError(f"{self.verdicts} was not written by this command; name another folder")
        return super().run(say)

    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        by_source: defaultdict[str, Counter[str]] = defaultdict(Counter)
        unknown, totals, rejected = Counter[str](), Counter[str](), list[Rejection]()
        temporary = temporary_name(self.verdicts)
        with pq.ParquetWriter(temporary, VERDICT_SCHEMA) as writer:
            for span in rows.spans:
                written = []
                for _, record in rows.scan(span):
                    if not isinstance(record, PairRecord):
                        rejected.append(record)
                        continue
                    tries = answers.tries(record.pair_id, QUESTION)
                    verdict = tries[-1].get("verdict", "unknown") if tries else "unknown"
                    written.append({"pair_id": record.pair_id, "verdict": verdict})
                    by_source[record.data_source][verdict] += 1
                    totals.update(tokens_of(tries))
                    if verdict == "unknown":
                        unknown[tries[-1]["cause"] if tries else NO_TCOT] += 1
                writer.write_table(pa.Table.from_pylist(written, schema=VERDICT_SCHEMA))
        publish(temporary, self.verdicts)
        pairs = sum(counts.total() for counts in by_source.values())
        counted = {source: {name: found[name] for name in VERDICTS} for source, found in sorted(by_source.items())}
        report = {"records": pairs, "by_source": {}, "rejected": rejected, "part": part_facts(self.verdicts, pairs)}
        summary = {
            "pairs": pairs,
            "rejected_rows": len(rejected),
            **{name: totals[name] for name in ("replies", "prompt_tokens", "completion_tokens")},
            **self.prices.cost(totals),
            "unknown_causes": dict(sorted(unknown.items())),
            "by_source": counted,
        }
        more = {"format": "embedrl verdicts 1", "served": served, "by_source": counted, "verdicts": summary}
        return finish(self.out, "relevance verdicts", facts, [report], media_root=None, more=more)

    def report(self, card: Mapping[str, Any]) -> list[str]:
        summary, total = card["verdicts"], Counter[str]()
        for found in summary["by_source"].values():
            total.update(found)
        width = max(len("data source"), *map(len, summary["by_source"]), 0)
        lines = [f"{'data source':{width}}  " + "  ".join(f"{name:>9}" for name in (*VERDICTS, "kept"))]
        for source, found in {**summary["by_source"], "all": total}.items():
            known = found["match"] + found["mismatch"]
            numbers = [
                *(f"{found[verdict]:,}" for verdict in VERDICTS),
                f"{found['match'] / known:.1%}" if known else "-",
            ]
            lines.append(f"{source:{width}}  " + "  ".join(f"{number:>9}" for number in numbers))
        lines += [f"unknown: {count:,} x {cause}" for cause, count in summary["unknown_causes"].items()]
        lines += [f"cost: {summary['cost']:,.4f}"] if "cost" in summary else []
        if summary["rejected_rows"]:
            lines.append(f"{summary['rejected_rows']:,} rows cannot be used, see {REJECTED_FILE}")
        return lines
