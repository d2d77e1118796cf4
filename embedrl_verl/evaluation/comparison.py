# SPDX-License-Identifier: Apache-2.0
"""How much better one view is than another, by data source, with intervals: where T-CoTs help and where they do not.

A difference counts as one only if its 95% interval leaves out zero: over several runs Student's t on the differences of
paired runs; with one run a bootstrap over its queries. Below `MIN_QUERIES` of a data source a resample has few distinct
values, so that two lucky queries would be "better": there is no interval then, and no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from embedrl_verl.evaluation.retrieval import ALL
from embedrl_verl.evaluation.stats import Interval, bootstrap_interval, mean_interval
from embedrl_verl.tables import table

Views = Mapping[str, Mapping[str, Any]]
"""By name, as `score_view` returns them."""
RAW = "raw"
"""The view of the input alone."""
MIN_QUERIES = 10
"""Of each data source or task that goes into an interval over queries."""


def hit1_interval(runs: Sequence[Views], view: str, minus: str | None = None, source: str = ALL) -> Interval:
    """Hit@1 of a view, or its gain over another, with its 95% interval, as `query_interval` has it for one run.

    Args:
        runs: the views of each run.
        source: of the queries; "all": the plain mean over sources.
    """
    if len(runs) > 1:
        hit1 = [run[view]["hit1"][source] - (run[minus]["hit1"][source] if minus else 0.0) for run in runs]
        return mean_interval(hit1)
    views = runs[0]
    groups = [
        [a - b for a, b in zip(hits, views[minus]["hits"][name] if minus else [0] * len(hits), strict=True)]
        for name, hits in views[view]["hits"].items()
        if source in (ALL, name)
    ]
    return query_interval(groups)


def query_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """The plain mean of the groups' means with its 95% bootstrap interval; its ends are NaN if a group has too few
    queries for a verdict (`MIN_QUERIES`)."""
    if min(map(len, groups)) >= MIN_QUERIES:
        return bootstrap_interval(groups)
    return Interval(statistics.fmean(map(statistics.fmean, groups)), math.nan, math.nan)


def verdict(gain: Interval) -> str:
    """better, WORSE, unclear where the interval holds 0, or too few queries for an interval."""
    if math.isnan(gain.low):
        return "too few queries"
    return "better" if gain.low > 0 else "WORSE" if gain.high < 0 else "unclear"


def interval_words(gain: Interval) -> str:
    """The interval in words."""
    return "no interval" if math.isnan(gain.low) else f"95% interval {gain.low:+.3f} to {gain.high:+.3f}"


def gain_cell(gain: Interval, *, in_points: bool = False) -> str:
    """A gain in [-1, 1] with interval and verdict as a cell of a table; `in_points`: x100, as scores beside it."""
    factor, digits = (100, 2) if in_points else (1, 3)
    ends = "" if math.isnan(gain.low) else f" [{factor * gain.low:+.2f}, {factor * gain.high:+.2f}]"
    return f"{factor * gain.mean:+.{digits}f}{ends} {verdict(gain):7}"


def source_rows(
    runs: Sequence[Views], names: Mapping[str, str], gains: Sequence[tuple[str, str]]
) -> list[list[object]]:
    """Rows of a table, the head first: Hit@1 of every view by data source, and gains with 95% intervals.

    Args:
        names: of the views that are shown, with their titles.
        gains: (view, base) pairs of views.
    """
    rows: list[list[object]] = [
        ["source", "queries", *names.values(), *(f"{names[view]} against {names[base]}" for view, base in gains)]
    ]
    sources = sources_of(runs[0])
    for source in [*sources, *([ALL] if len(sources) > 1 else [])]:
        queries = sum(len(hits) for name, hits in next(iter(runs[0].values()))["hits"].items() if source in (ALL, name))
        means = [statistics.fmean(run[view]["hit1"][source] for run in runs) for view in names]
        found = [hit1_interval(runs, view, base, source) for view, base in gains]
        rows.append([source, queries, *(f"{mean:.3f}" for mean in means), *map(gain_cell, found)])
    return rows


def sources_of(views: Views) -> list[str]:
    """The data sources of an evaluation."""
    return [source for source in next(iter(views.values()))["hit1"] if source != ALL]


def source_table(runs: Sequence[Views], names: Mapping[str, str], base: str, compared: Sequence[str]) -> list[str]:
    """`source_rows` as lines for the terminal, of some views compared with `base`."""
    rows = source_rows(runs, names, [(view, base) for view in compared])
    lines = table(*rows, left=(0, *range(2 + len(names), len(rows[0]))))
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
