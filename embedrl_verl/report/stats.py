# SPDX-License-Identifier: Apache-2.0
"""`embedrl data stats`: lengths in tokens against a recipe's limits, by source and side, as a table or as JSON."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
from pandas import DataFrame
from tqdm import tqdm

from embedrl_verl.data.schema import Side
from embedrl_verl.data.table import PairTable, Problem
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.report.lengths import LengthMeter, Lengths, Measure
from embedrl_verl.report.recipe import RecipeLimits
from embedrl_verl.report.rows import choose

PERCENTILES = (50, 90, 99)
SHOWN_BAD = 20
Tokens: TypeAlias = "dict[tuple[str, Measure, Side], array[int]]"


def print_lengths(
    files: Sequence[str], tokenizer: str, limits: RecipeLimits, limit: int | None, seed: int | None, *, as_json: bool
) -> int:
    """Count the rows, or `limit` of them, and print. Returns 0, or 3 if a row cannot be used: it is not counted."""
    table = PairTable(files, limits.media_root)
    chosen = choose(table, len(table) if limit is None else limit, seed)
    meter = LengthMeter.from_pretrained(tokenizer, limits)

    def measure(number: int) -> tuple[str, Lengths] | str:
        pair = table[number]
        if isinstance(pair, Problem):
            return pair.message
        try:
            return pair.record.data_source, meter.measure(pair, table.media_root(number))
        except MediaError as error:
            return str(error)

    by_source: Tokens = {}
    everything: Tokens = {}
    bad: list[str] = []
    measured = in_threads(measure, chosen, default_threads())
    for found in tqdm(measured, total=len(chosen), desc="counting tokens", unit="record", disable=None):
        if isinstance(found, str):
            bad.append(found)
            continue
        for (name, side), count in found[1].items():
            by_source.setdefault((found[0], name, side), array("i")).append(count)
            everything.setdefault(("all", name, side), array("i")).append(count)
    counted = len(chosen) - len(bad)
    if as_json:
        report = {
            "files": [str(file) for file in table.files],
            "records": len(table),
            "counted": counted,
            "unusable": len(bad),
            "first_unusable": bad[:SHOWN_BAD],
            "limits": asdict(limits),
            "lengths": summaries(by_source, meter),
            "all": summaries(everything, meter),
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return DataError.exit_code if bad else 0
    names = {"source": "data source", "measure": "length", "share_over": "share over"}
    told = {"mean": "{:.1f}".format, "share over": "{:.2%}".format}
    if counted:
        rows = DataFrame(summaries(by_source, meter) + summaries(everything, meter)).rename(columns=names)
        print(rows.to_string(index=False, formatters=told), end="\n\n")
    print(
        "lengths in tokens. prompt: with media, against data.max_prompt_length. tcot: with its end token, against\n"
        "data.max_response_length. text: of the side itself, cut by the Embedder at embedrl.embedder.max_text_tokens."
    )
    for message in bad[:SHOWN_BAD]:
        print(f"BAD {message}")
    more = f"; the first {SHOWN_BAD} are named" if len(bad) > SHOWN_BAD else ""
    print(f"{counted} of {len(table)} records counted, {len(bad)} cannot be used{more}")
    return DataError.exit_code if bad else 0


def summaries(tokens: Tokens, meter: LengthMeter) -> list[dict[str, Any]]:
    """By source, length and side. Percentiles are lengths that rows have (nearest rank)."""
    found = []
    for source, name, side in sorted(tokens):
        counts, limit = np.asarray(tokens[source, name, side]), meter.limit(name)
        ranks = np.percentile(counts, PERCENTILES, method="inverted_cdf").tolist()
        summary = {"source": source, "measure": name, "side": side, "rows": len(counts), "mean": float(counts.mean())}
        summary |= {f"p{percent}": rank for percent, rank in zip(PERCENTILES, ranks, strict=True)}
        over = counts > limit
        summary |= {"max": int(counts.max()), "limit": limit, "over": int(over.sum()), "share_over": float(over.mean())}
        found.append(summary)
    return found
