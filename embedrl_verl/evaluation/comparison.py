# SPDX-License-Identifier: Apache-2.0
"""How much better one view is than another, by data source, with intervals: where T-CoTs help and where they do not.

A difference counts as one only if its 95% interval leaves out zero: over several runs Student's t on the differences of
paired runs; with one run a bootstrap over its queries.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from embedrl_verl.evaluation.stats import Interval, bootstrap_mean_of_means, mean_interval
from embedrl_verl.tables import table

Views = Mapping[str, Mapping[str, Any]]
"""By name, as `score_view` returns them."""
ALL = "all"
RAW = "raw"
"""The view of the input alone."""


def hit1_interval(runs: Sequence[Views], view: str, minus: str | None = None, source: str = ALL) -> Interval:
    """Hit@1 of a view, or its gain over another, with its 95% interval; the ends are NaN where there is but one query.

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
    if sum(map(len, groups)) > 1:
        return bootstrap_mean_of_means(groups)
    return Interval(statistics.fmean(groups[0]), math.nan, math.nan)


def verdict(gain: Interval) -> str:
    """better, WORSE, or unclear where the interval holds 0."""
    return "better" if gain.low > 0 else "WORSE" if gain.high < 0 else "unclear"


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
        shown = [f"{one.mean:+.3f} [{one.low:+.2f}, {one.high:+.2f}] {verdict(one):7}" for one in found]
        rows.append([source, queries, *(f"{mean:.3f}" for mean in means), *shown])
    return rows


def sources_of(views: Views) -> list[str]:
    """The data sources of an evaluation."""
    return [source for source in next(iter(views.values()))["hit1"] if source != ALL]


def source_table(runs: Sequence[Views], names: Mapping[str, str], base: str, compared: Sequence[str]) -> list[str]:
    """`source_rows` as lines for the terminal, of some views compared with `base`."""
    rows = source_rows(runs, names, [(view, base) for view in compared])
    lines = table(*rows, left=(0, *range(2 + len(names), len(rows[0]))))
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
