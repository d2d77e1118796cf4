# SPDX-License-Identifier: Apache-2.0
"""`embedrl data stats FILE... --tokenizer DIR`: lengths in tokens against a recipe's limits, by source and side.

Prompts are counted as the rollout reads them, media included. A row that cannot be read is named and left out of the
counts; the exit code is then 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedrl_verl.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    from embedrl_verl.data.schema import PairRecord
    from embedrl_verl.report.lengths import LengthMeter, LengthSummary, LengthTable
    from embedrl_verl.report.recipe import RecipeLimits
    from embedrl_verl.report.rows import Row, RowIndex

SHOWN_BAD = 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `stats` to `embedrl data`; `run` carries it out."""
    from embedrl_verl.report.recipe import add_options

    stats = commands.add_parser("stats", help="lengths in tokens against a recipe's limits, by source and side")
    stats.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    stats.add_argument("--tokenizer", required=True, metavar="DIR", help="the Reasoner's folder or hub id")
    stats.add_argument("--limit", type=int, metavar="N", help="count N records, evenly spaced in each source (all)")
    stats.add_argument("--seed", type=int, metavar="N", help="with --limit: draw them at random")
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_options(stats)


def run(args: argparse.Namespace) -> int:
    """Count and print. Returns 0, or 3 if a row cannot be used.

    Raises:
        ConfigError: options that cannot work, or a tokenizer that cannot be loaded.
        DataError: a file cannot be read or holds no pair records.
    """
    from embedrl_verl.report.lengths import LengthMeter, LengthTable
    from embedrl_verl.report.recipe import limits_of
    from embedrl_verl.report.rows import choose, index_rows

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1; got {args.limit}")
    limits = limits_of(args)
    index = index_rows(args.files, limits.media_root)
    chosen: Sequence[int] = range(len(index)) if args.limit is None else choose(index, args.limit, args.seed)
    meter = LengthMeter.from_pretrained(args.tokenizer, limits)
    table, bad = LengthTable(), _Bad()
    _measure(index, chosen, meter, table, bad)
    _print_json(index, limits, table, bad) if args.json else _print_table(index, limits, table, bad)
    return DataError.exit_code if bad.count else 0


@dataclasses.dataclass
class _Bad:
    """Rows that cannot be used: how many, and the first ones in words."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_BAD:
            self.first.append(message)


def _measure(index: RowIndex, chosen: Sequence[int], meter: LengthMeter, table: LengthTable, bad: _Bad) -> None:
    from tqdm import tqdm

    from embedrl_verl.report.lengths import default_threads, measure_rows
    from embedrl_verl.report.rows import read_rows

    def records() -> Iterator[tuple[Row, PairRecord]]:
        rows = read_rows(index, chosen)
        for row in tqdm(rows, total=len(chosen), desc="counting tokens", unit="record", disable=None):
            if isinstance(row.found, DataError):
                bad.add(str(row.found))
            else:
                yield row, row.found

    for record, lengths in measure_rows(records(), meter, default_threads()):
        if isinstance(lengths, MediaError):
            bad.add(str(lengths))
        else:
            table.add(record.data_source, lengths)


def _print_table(index: RowIndex, limits: RecipeLimits, table: LengthTable, bad: _Bad) -> None:
    from embedrl_verl.report.lengths import PERCENTILES

    summaries = table.summaries(limits)
    if len({summary.source for summary in summaries}) > 1:
        summaries += table.totals(limits)
    width = max([len("data source"), *(len(summary.source) for summary in summaries)])
    percentiles = "".join(f"{f'p{percent}':>8}" for percent in PERCENTILES)
    print(
        f"{'data source':{width}}  {'length':8}{'side':8}{'rows':>9}{'mean':>10}{percentiles}{'max':>8}"
        f"{'limit':>8}{'over':>8}  share over"
    )
    previous = None
    for summary in summaries:
        name = summary.source if summary.source != previous else ""
        previous = summary.source
        values = "".join(f"{value:>8}" for value in summary.percentiles)
        print(
            f"{name:{width}}  {summary.measure:8}{summary.side:8}{summary.rows:>9}{summary.mean:>10.1f}{values}"
            f"{summary.max:>8}{summary.limit:>8}{summary.over:>8}  {summary.share_over:.2%}"
        )
    print(
        "\nlengths in tokens. prompt: with media, against data.max_prompt_length. tcot: with its end token, against\n"
        "data.max_response_length. text: of the side itself, cut by the Embedder at embedrl.embedder.max_text_tokens."
    )
    for message in bad.first:
        print(f"BAD {message}")
    if bad.count > len(bad.first):
        print(f"... and {bad.count - len(bad.first)} more")
    print(f"{table.rows} of {len(index)} records counted, {bad.count} cannot be used")


def _print_json(index: RowIndex, limits: RecipeLimits, table: LengthTable, bad: _Bad) -> None:
    report: dict[str, Any] = {
        "files": [str(file) for file in index.files],
        "records": len(index),
        "counted": table.rows,
        "unusable": bad.count,
        "first_unusable": bad.first,
        "limits": {
            "data.max_prompt_length": limits.max_prompt_length,
            "data.max_response_length": limits.max_response_length,
            "embedrl.embedder.max_text_tokens": limits.max_text_tokens,
            **{f"data.embedrl.{name}": value for name, value in dataclasses.asdict(limits.data).items()},
        },
        "lengths": [_plain(summary) for summary in table.summaries(limits)],
        "all": [_plain(summary) for summary in table.totals(limits)],
    }
    json.dump(report, sys.stdout, indent=1, ensure_ascii=False)
    print()


def _plain(summary: LengthSummary) -> dict[str, Any]:
    from embedrl_verl.report.lengths import PERCENTILES

    values = dataclasses.asdict(summary)
    ranks = values.pop("percentiles")
    values.update({f"p{percent}": rank for percent, rank in zip(PERCENTILES, ranks, strict=True)})
    return {**values, "share_over": summary.share_over}
