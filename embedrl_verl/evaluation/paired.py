# SPDX-License-Identifier: Apache-2.0
"""`embedrl compare`: two results query by query, with paired bootstrap intervals.

A result is a folder of `embedrl benchmark` or of `embedrl eval`. The same queries are resampled on both sides, so the
interval is of the difference, and far narrower than those of two scores. Only results of equal stamps are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from embedrl_verl.data.files import read_object
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.comparison import gain_cell, query_interval
from embedrl_verl.evaluation.stamp import refuse_other_stamp
from embedrl_verl.evaluation.stats import Interval
from embedrl_verl.tables import table


@dataclass(frozen=True)
class TaskResult:
    """Of one task or data source: its stamp, and by cell (or view) the score of each query by id, in [0, 1]."""

    stamp: Mapping[str, str]
    cells: Mapping[str, Mapping[str, float]]


def read_results(folder: Path) -> dict[str, TaskResult]:
    """The results of a folder by task (benchmark) or data source (eval).

    Raises:
        ConfigError: it holds none, or was written before results had stamps and ids.
    """
    if (folder / "evaluation.json").is_file():
        return _of_eval(folder / "evaluation.json")
    found = {}
    for file in sorted(folder.rglob("*.parquet")):
        name = str(file.relative_to(folder).with_suffix(""))
        # It is written last. Other files may lie beside the results, in pairs too.
        scores = read_object(score_file) if (score_file := folder / f"{name}.json").is_file() else {}
        if {"metric", "stamp"} <= scores.keys():
            found[name] = _of_task(scores, file)
    if not found:
        raise ConfigError(f"{folder} must be a folder of embedrl benchmark or of embedrl eval; it has no results")
    return found


def _of_task(scores: Mapping[str, object], file: Path) -> TaskResult:
    metric, stamp = str(scores["metric"]), scores["stamp"]
    rows = pq.read_table(file, columns=["cell", "query", metric]).to_pylist()
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        cells.setdefault(row["cell"], {})[row["query"]] = row[metric]
    assert isinstance(stamp, dict)
    return TaskResult({**stamp, "metric": metric}, cells)


def _of_eval(file: Path) -> dict[str, TaskResult]:
    result = read_object(file)
    if "stamp" not in result:
        raise ConfigError(f"{file} is of an older version, without a stamp and ids of queries; evaluate again")
    return {
        source: TaskResult(
            result["stamp"],
            {name: dict(zip(ids, view["hits"][source], strict=True)) for name, view in result["views"].items()},
        )
        for source, ids in result["query_ids"].items()
    }


def paired_gains(
    ours: Mapping[str, TaskResult],
    theirs: Mapping[str, TaskResult],
    where: str,
    *,
    cell: str | None = None,
    base: str | None = None,
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Scores (ours, theirs) of each query, by task and cell, of tasks and cells that both have.

    Args:
        where: what the two are, for messages.
        cell, base: this cell of ours against that one of theirs; None: each against its own name.

    Raises:
        ConfigError: nothing is shared, or a stamp differs. DataError: the queries are not the same.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name in ours:
        if name not in theirs:
            continue
        refuse_other_stamp(ours[name].stamp, theirs[name].stamp, f"the results of {name} in {where}")
        for own in [cell] if cell else ours[name].cells:
            a, b = ours[name].cells.get(own), theirs[name].cells.get(base or own)
            if a is None or b is None:
                continue
            if lost := sorted(a.keys() ^ b.keys()):
                raise DataError(f"{name}: both must have the same queries in {where}; only one has {lost[0]}")
            found[name, _title(own, base)] = [(a[query], b[query]) for query in a]
    if not found:
        cells = sorted({one for result in (*ours.values(), *theirs.values()) for one in result.cells})
        raise ConfigError(f"{where} must share a task and a cell; there are {', '.join(ours)} and {', '.join(cells)}")
    return found


def compare(one: str, other: str, *, cell: str | None = None, base: str | None = None) -> list[str]:
    """Lines of a table, all x100: scores, and the gain of the first folder over the second with its 95% interval; under
    it the tasks and cells that are not compared.

    Arguments and errors as `paired_gains`. ConfigError too if a folder has no such cell.
    """
    ours, theirs = read_results(Path(one)), read_results(Path(other))
    _check_cell(ours, one, "--cell", cell)
    _check_cell(
        theirs, other, "--base" if base else "--cell (--base names another cell of the second folder)", base or cell
    )
    pairs = paired_gains(ours, theirs, f"{one} and {other}", cell=cell, base=base)
    rows: list[list[object]] = [["task", "cell", "queries", one, other, "gain (points)"]]
    for (name, title), scores in pairs.items():
        rows.append([name, title, *_row([scores])])
    for title in dict.fromkeys(title for _, title in pairs):
        groups = [scores for (_, own), scores in pairs.items() if own == title]
        if len(groups) > 1:
            rows.append([f"mean of {len(groups)}", title, *_row(groups)])
    lines = table(*rows, left=(0, 1, 5))
    if only := sorted(ours.keys() ^ theirs.keys()):
        lines.append(f"only in one of the two: {', '.join(only)}")
    return lines + _left_out(ours, theirs, pairs, cell, base)


def _cells(results: Mapping[str, TaskResult]) -> list[str]:
    return list(dict.fromkeys(cell for result in results.values() for cell in result.cells))


def _check_cell(results: Mapping[str, TaskResult], folder: str, option: str, cell: str | None) -> None:
    if cell is not None and cell not in _cells(results):
        raise ConfigError(f"{option} must be a cell of {folder}: {', '.join(_cells(results))}; got {cell!r}")


def _left_out(
    ours: Mapping[str, TaskResult],
    theirs: Mapping[str, TaskResult],
    pairs: Mapping[tuple[str, str], object],
    cell: str | None,
    base: str | None,
) -> list[str]:
    """A line for each cell that is not compared in tasks that both have, because one of the two lacks it there."""
    tasks: dict[str, list[str]] = {}
    for name in (name for name in ours if name in theirs):
        asked = [cell] if cell else [*ours[name].cells, *(() if base else theirs[name].cells)]
        for own in dict.fromkeys(asked):
            title = _title(own, base)
            if (name, title) not in pairs:
                tasks.setdefault(title, []).append(name)
    return [
        f"cell not compared, one of the two lacks it: {title} of {', '.join(names)}" for title, names in tasks.items()
    ]


def _title(cell: str, base: str | None) -> str:
    return cell if base in (None, cell) else f"{cell} - {base}"


class Paired(NamedTuple):
    """Of tasks: queries, and in [0, 1] the plain mean of their scores on both sides with the gain of the first."""

    queries: int
    ours: float
    theirs: float
    gain: Interval


def paired(groups: Sequence[Sequence[tuple[float, float]]]) -> Paired:
    """What one side gains over the other.

    Args:
        groups: of each task, (ours, theirs) of its queries.
    """
    means = [statistics.fmean(statistics.fmean(pair[side] for pair in group) for group in groups) for side in (0, 1)]
    gain = query_interval([[a - b for a, b in group] for group in groups])
    return Paired(sum(map(len, groups)), means[0], means[1], gain)


def _row(groups: Sequence[Sequence[tuple[float, float]]]) -> list[object]:
    found = paired(groups)
    return [
        found.queries,
        f"{100 * found.ours:.2f}",
        f"{100 * found.theirs:.2f}",
        gain_cell(found.gain, in_points=True),
    ]
