# SPDX-License-Identifier: Apache-2.0
"""The end of recipes/compare_rewards_tiny_cpu.sh: what each reward learnt over the same seeds, as table and curves.

    python benchmarks/reward_table.py OUT no_judge=RUN,RUN,RUN paper=RUN,RUN,RUN

Rewards are in different units, so runs are compared by what no reward function touches: Hit@1 of held-out pairs, read
by the same frozen Embedder. Differences to the first reward are paired by seed (Student's t, 95%).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.stats import mean_interval
from recipes.tiny_digits.summary import HIT1, REWARD, SEED_COLORS, Run, mean_curve, smoothed

JUDGED, BLIND, UNKNOWN = "judge/hit_rate/mean", "judge/blind_rate/mean", "judge/unknown_rate"
AFTER = "hit@1/after"
COLORS = (*SEED_COLORS, "#744210", "#718096", "#d69e2e", "#1a202c")


def compare(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """By reward: means over seeds and the paired difference of held-out Hit@1 to the first reward."""
    seeds = {name: [run.evaluation["seed"] for run in found] for name, found in runs.items()}
    orders = {tuple(one) for one in seeds.values()}
    if not 2 <= len(runs) <= len(COLORS) or len(orders) > 1 or any(len(set(one)) < len(one) for one in orders):
        raise ConfigError(
            f"name 2 to {len(COLORS)} rewards, each with the same seeds in the same order, every seed once; got {seeds}"
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
            known = [tenths for run in found if (tenths := run.tenths(key))]
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
        cells = [
            name,
            f"{row['mean']:.3f}",
            ", ".join(f"{value:.3f}" for value in row["held_out_hit@1"]),
            f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap and name != first else "",
            *(f"{row[key][0]:.3f} → {row[key][1]:.3f}" if key in row else "" for key in (REWARD, JUDGED)),
            *(f"{row[key][1]:.3f}" if key in row else "" for key in (BLIND, UNKNOWN)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Hit@1 in the batch, of a judge its hit rate over a blind one, and held-out Hit@1; a colour a reward."""
    colors = dict(zip(runs, COLORS, strict=False))
    has_judge = any(run.curve(JUDGED) for found in runs.values() for run in found)
    figure = Figure(figsize=(15 if has_judge else 10.5, 4.4), layout="constrained")
    hit, *judged, bars = figure.subplots(1, 3 if has_judge else 2)
    for name, found in runs.items():
        _mean_curve(hit, found, HIT1, colors[name], label=name, linewidth=2.2)
        for axes in judged:
            _mean_curve(axes, found, JUDGED, colors[name], label=name, linewidth=2.2)
            _mean_curve(axes, found, BLIND, colors[name], linestyle="--", linewidth=1.2)
    hit.set(title="Hit@1 in the batch", ylabel="share of queries and targets")
    for axes in judged:
        axes.set(title="Judge names the own pair (dashed: blind)", ylabel="share of judged rows")
    for axes in (hit, *judged):
        axes.set(xlabel="RL step", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        labels = axes.get_legend_handles_labels()[1]
        axes.legend(loc="lower right", ncols=1 if len(labels) <= 5 else 2, frameon=False, fontsize=9)
    for place, (name, found) in enumerate(runs.items()):
        values = [run.numbers()[AFTER] for run in found]
        bars.bar(place, statistics.fmean(values), width=0.62, color=colors[name])
        bars.scatter([place] * len(values), values, s=16, color="white", edgecolor="#222222", zorder=3)
        label = f"{statistics.fmean(values):.{3 if len(runs) <= 6 else 2}f}"
        bars.annotate(label, (place, max(values)), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    bars.set_xticks(range(len(runs)), list(runs), rotation=20, ha="right", rotation_mode="anchor")
    bars.set(title="Hit@1 on held-out pairs, after RL", ylabel="share of queries", ylim=(0, 1.1))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _mean_curve(axes: Axes, runs: Sequence[Run], key: str, color: str, **style: Any) -> None:
    if curves := [curve for run in runs if (curve := run.curve(key))]:
        mean = mean_curve(curves)
        line = smoothed(mean, max(1, len(mean) // 10) | 1)
        axes.plot(list(line), list(line.values()), color=color, **style)


def main(out: Path, rewards: list[str]) -> None:
    """Print the table; write `rewards.json`, `table.md` and `curves.png` to OUT. REWARDS: NAME=RUN[,RUN...]"""
    runs: dict[str, list[Run]] = {}
    for one in rewards:
        name, _, folders = one.partition("=")
        if not name or not folders or name in runs:
            raise ConfigError(f"a reward must be NAME=RUN[,RUN...], each name once; got {one!r}")
        runs[name] = [Run(Path(folder)) for folder in folders.split(",")]
    rows = compare(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rewards.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    draw(runs, out / "curves.png")
    print(f"{table(rows)}\n\nwrote rewards.json, table.md and curves.png in {out}")


if __name__ == "__main__":
    typer.run(main)
