# SPDX-License-Identifier: Apache-2.0
"""Reward functions compared over the same seeds: a table of what each one learnt, and its curves.

Rewards are in different units, so runs are compared by what no reward function touches: Hit@1 of held-out pairs, read
by the same frozen Embedder. Differences are paired by seed (Student's t, 95%).

Command: `python -m embedrl_verl.tiny.reward_table --runs no_judge=DIR,DIR,DIR --runs paper=DIR,DIR,DIR --out DIR`;
the first reward is the one that the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.stats import mean_interval
from embedrl_verl.tiny.summary import HIT1, REWARD, SEED_COLORS, Run, smoothed

JUDGED, BLIND, UNKNOWN = "judge/hit_rate/mean", "judge/blind_rate/mean", "judge/unknown_rate"
AFTER = "hit@1/after"
COLORS = (*SEED_COLORS, "#744210", "#718096", "#d69e2e", "#1a202c")


def tenths(run: Run, key: str) -> tuple[float, float] | None:
    """Mean of a metric over the first and the last tenth of the steps; None where it was never logged."""
    values = list(run.curve(key).values())
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def compare(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """By reward: means over seeds and the paired difference of held-out Hit@1 to the first reward.

    Raises:
        ConfigError: fewer than two rewards, other seeds in one than in another, or a seed twice.
    """
    seeds = {name: [run.evaluation["seed"] for run in found] for name, found in runs.items()}
    orders = {tuple(one) for one in seeds.values()}
    if len(runs) < 2 or len(orders) > 1 or any(len(set(one)) < len(one) for one in orders):
        raise ConfigError(
            "--runs must name two or more rewards, each with the same seeds in the same order and every seed once; "
            f"got {seeds}"
        )
    base = [run.numbers()[AFTER] for run in next(iter(runs.values()))]
    result = {}
    for name, found in runs.items():
        after = [run.numbers()[AFTER] for run in found]
        row: dict[str, Any] = {"held_out_hit@1": after, "mean": statistics.fmean(after), "seeds": seeds[name]}
        if len(found) > 1:
            row["interval"] = mean_interval(after)._asdict()
            row["difference"] = mean_interval([a - b for a, b in zip(after, base, strict=True)])._asdict()
        for key in (REWARD, JUDGED, BLIND, UNKNOWN):
            both = [tenths(run, key) for run in found]
            known = [one for one in both if one is not None]
            if known:
                row[key] = [statistics.fmean(one[i] for one in known) for i in (0, 1)]
        result[name] = row
    return result


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one line a reward. Two numbers with an arrow are the first and the last tenth of the steps."""
    first = next(iter(rows))
    head = f"| reward | held-out Hit@1 | each seed | against {first} (95%) | reward | judge's hits | blind | unknown |"
    lines = [head, "|" + "---|" * 8]
    for name, row in rows.items():
        gap = row.get("difference")
        against = (
            "" if name == first or gap is None else f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        )
        cells = [
            name,
            f"{row['mean']:.3f}",
            ", ".join(f"{value:.3f}" for value in row["held_out_hit@1"]),
            against,
            *(_arrow(row.get(key)) for key in (REWARD, JUDGED)),
            *(f"{row[key][1]:.3f}" if key in row else "" for key in (BLIND, UNKNOWN)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _arrow(both: Sequence[float] | None) -> str:
    return "" if both is None else f"{both[0]:.3f} → {both[1]:.3f}"


def draw(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Hit@1 in the batch, held-out Hit@1 and, if a run had a judge, its hit rate over a blind one; a colour a reward.

    Raises:
        ConfigError: more rewards than there are colours to tell them apart.
    """
    if len(runs) > len(COLORS):
        raise ConfigError(
            f"--runs must name at most {len(COLORS)} rewards, as there are no more colours; got {len(runs)}"
        )
    colors = dict(zip(runs, COLORS, strict=False))
    has_judge = any(run.curve(JUDGED) for found in runs.values() for run in found)
    figure = Figure(figsize=(15 if has_judge else 10.5, 4.4), layout="constrained")
    panels = iter(figure.subplots(1, 3 if has_judge else 2))
    hit = next(panels)
    for name, found in runs.items():
        _mean_curve(hit, found, HIT1, colors[name], name)
    hit.set(title="Hit@1 in the batch", ylabel="share of queries and targets")
    _finish_curves(hit)
    if has_judge:
        judged = next(panels)
        for name, found in runs.items():
            _mean_curve(judged, found, JUDGED, colors[name], name)
            _mean_curve(judged, found, BLIND, colors[name], None, dashed=True)
        judged.set(title="Judge names the own pair (dashed: blind)", ylabel="share of judged rows")
        _finish_curves(judged)
    bars = next(panels)
    for place, (name, found) in enumerate(runs.items()):
        values = [run.numbers()[AFTER] for run in found]
        bars.bar(place, statistics.fmean(values), width=0.62, color=colors[name])
        bars.scatter([place] * len(values), values, s=16, color="white", edgecolor="#222222", zorder=3)
        label = f"{statistics.fmean(values):.3f}" if len(runs) <= 6 else f"{statistics.fmean(values):.2f}"
        bars.annotate(label, (place, max(values)), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    bars.set_xticks(range(len(runs)), list(runs), rotation=20, ha="right", rotation_mode="anchor")
    bars.set(title="Hit@1 on held-out pairs, after RL", ylabel="share of queries", ylim=(0, 1.1))
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _finish_curves(axes: Axes) -> None:
    axes.set(xlabel="RL step", ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(loc="lower right", ncols=1 if len(handles) <= 5 else 2, frameon=False, fontsize=9)


def _mean_curve(
    axes: Axes, runs: Sequence[Run], key: str, color: str, label: str | None, *, dashed: bool = False
) -> None:
    curves = [curve for curve in (run.curve(key) for run in runs) if curve]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    mean = {step: statistics.fmean(curve[step] for curve in curves) for step in steps}
    line = smoothed(mean, max(1, len(steps) // 10) | 1)
    style = {"linestyle": "--", "linewidth": 1.2} if dashed else {"linestyle": "-", "linewidth": 2.2}
    axes.plot(list(line), list(line.values()), color=color, label=label, **style)


def _load(argument: str, folder: str) -> Run:
    try:
        return Run.load(Path(folder))
    except DataError as error:
        raise DataError(f"--runs {argument}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: print the table, write `rewards.json`, `table.md` and `curves.png`."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.reward_table", description=compare.__doc__)
    parser.add_argument("--runs", action="append", required=True, metavar="NAME=DIR[,DIR...]", help="once a reward")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    runs: dict[str, list[Run]] = {}
    for one in args.runs:
        name, _, folders = one.partition("=")
        if not name or not folders or name in runs:
            raise ConfigError(f"--runs must be NAME=DIR[,DIR...], each name once; got {one!r}")
        runs[name] = [_load(one, folder) for folder in folders.split(",")]
    rows = compare(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rewards.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    draw(runs, args.out / "curves.png")
    print(table(rows))
    print(f"\nwrote rewards.json, table.md and curves.png in {args.out}")


if __name__ == "__main__":
    main()
