# SPDX-License-Identifier: Apache-2.0
"""`embedrl data stats`: lengths in tokens against a recipe's limits, by source and side, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.report.lengths import PERCENTILES, LengthMeter, Lengths, LengthSummary, LengthTable
from embedrl_verl.report.recipe import RecipeLimits
from embedrl_verl.report.rows import Row, RowIndex, choose, index_rows, read_rows

SHOWN_BAD = 20


def print_lengths(
    files: Sequence[str], tokenizer: str, limits: RecipeLimits, limit: int | None, seed: int | None, *, as_json: bool
) -> int:
    """Count the rows, or `limit` of them, and print. Returns 0, or 3 if a row cannot be used: it is not counted."""
    index = index_rows(files, limits.media_root)
    chosen: Sequence[int] = range(len(index)) if limit is None else choose(index, limit, seed)
    meter = LengthMeter.from_pretrained(tokenizer, limits)

    def measure(row: Row) -> tuple[str, Lengths] | DataError:
        if isinstance(row.found, DataError):
            return row.found
        try:
            return row.found.data_source, meter.measure(row.found, row)
        except MediaError as error:
            return error

    table, bad = LengthTable(), list[str]()
    measured = in_threads(measure, read_rows(index, chosen), default_threads())
    for found in tqdm(measured, total=len(chosen), desc="counting tokens", unit="record", disable=None):
        if isinstance(found, DataError):
            bad.append(str(found))
        else:
            table.add(*found)
    (_print_json if as_json else _print_table)(index, limits, table, bad)
    return DataError.exit_code if bad else 0


def _print_table(index: RowIndex, limits: RecipeLimits, table: LengthTable, bad: list[str]) -> None:
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
    for message in bad[:SHOWN_BAD]:
        print(f"BAD {message}")
    if len(bad) > SHOWN_BAD:
        print(f"... and {len(bad) - SHOWN_BAD} more")
    print(f"{table.rows} of {len(index)} records counted, {len(bad)} cannot be used")


def _print_json(index: RowIndex, limits: RecipeLimits, table: LengthTable, bad: list[str]) -> None:
    report: dict[str, Any] = {
        "files": [str(file) for file in index.files],
        "records": len(index),
        "counted": table.rows,
        "unusable": len(bad),
        "first_unusable": bad[:SHOWN_BAD],
        "limits": {
            "data.max_prompt_length": limits.max_prompt_length,
            "data.max_response_length": limits.max_response_length,
            "embedrl.embedder.max_text_tokens": limits.max_text_tokens,
            **{f"data.embedrl.{name}": value for name, value in asdict(limits.data).items()},
        },
        "lengths": [_plain(summary) for summary in table.summaries(limits)],
        "all": [_plain(summary) for summary in table.totals(limits)],
    }
    json.dump(report, sys.stdout, indent=1, ensure_ascii=False)
    print()


def _plain(summary: LengthSummary) -> dict[str, Any]:
    values = asdict(summary)
    ranks = values.pop("percentiles")
    values |= {f"p{percent}": rank for percent, rank in zip(PERCENTILES, ranks, strict=True)}
    return {**values, "share_over": summary.share_over}
