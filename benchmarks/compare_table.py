# SPDX-License-Identifier: Apache-2.0
"""The end of recipes/compare_tiny_cpu.sh: what each variant of EG-RL learnt over the same seeds, as tables and curves.

    python benchmarks/compare_table.py OUT full=RUN,RUN,RUN no_evidence=RUN,RUN,RUN

Rewards are in different units, so runs are compared by what no reward function touches: Hit@1 of held-out pairs, read
by a frozen Embedder. Differences to the first variant are paired by seed (Student's t, 95%). The raw input is that of
the first variant's runs.
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
RAW_ROW, RAW_COLOR = "raw", "#9aa5b1"
COLORS = (*SEED_COLORS, "#744210", "#718096", "#d69e2e", "#1a202c")


def compare(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """By variant, and for the raw input: means over seeds, and paired differences of held-out Hit@1 to the first."""
    seeds = {name: [run.evaluation["seed"] for run in found] for name, found in runs.items()}
    orders = {tuple(one) for one in seeds.values()}
    if not 2 <= len(runs) <= len(COLORS) or len(orders) > 1 or any(len(set(one)) < len(one) for one in orders):
        raise ConfigError(
            f"name 2 to {len(COLORS)} variants, each with the same seeds in the same order, each seed once; got {seeds}"
        )
    if RAW_ROW in runs:
        raise ConfigError(f"a variant must not be called {RAW_ROW!r}, the row of the raw input")
    first = next(iter(runs.values()))
    result = {name: _scores(found, "after", first) for name, found in runs.items()}
    result[RAW_ROW] = _scores(first, "raw", first)
    for name, found in runs.items():
        result[name]["seeds"] = seeds[name]
        for key in (REWARD, JUDGED, BLIND, UNKNOWN):
            known = [tenths for run in found if (tenths := run.tenths(key))]
            if known:
                result[name][key] = [statistics.fmean(one[i] for one in known) for i in (0, 1)]
    return result


def _scores(runs: Sequence[Run], view: str, first: Sequence[Run]) -> dict[str, Any]:
    """Held-out Hit@1 of a view: each seed, and by data source and their mean ("all") the mean, its interval, and the
    difference to the first variant's runs after RL."""
    row: dict[str, Any] = {"held_out_hit@1": [run.views[view]["hit1"]["all"] for run in runs], "by_source": {}}
    for source in runs[0].views[view]["hit1"]:
        values, base = (
            [run.views[name]["hit1"][source] for run in found] for name, found in ((view, runs), ("after", first))
        )
        cell: dict[str, Any] = {"mean": statistics.fmean(values)}
        if len(runs) > 1:
            cell["interval"] = mean_interval(values)._asdict()
            cell["difference"] = mean_interval([a - b for a, b in zip(values, base, strict=True)])._asdict()
        row["by_source"][source] = cell
    return row


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one line a variant. Two numbers with an arrow are the first and the last tenth of the steps."""
    first = next(iter(rows))
    head = f"| variant | held-out Hit@1 | each seed | against {first} (95%) | reward | judge's hits | blind | unknown |"
    lines = [head, "|" + "---|" * 8]
    for name, row in rows.items():
        whole = row["by_source"]["all"]
        cells = [
            name,
            f"{whole['mean']:.3f}",
            ", ".join(f"{value:.3f}" for value in row["held_out_hit@1"]),
            _gap(whole) if name != first else "",
            *(f"{row[key][0]:.3f} → {row[key][1]:.3f}" if key in row else "" for key in (REWARD, JUDGED)),
            *(f"{row[key][1]:.3f}" if key in row else "" for key in (BLIND, UNKNOWN)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def source_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: Hit@1 of the first variant by data source, and what the others have more or less of it."""
    first, *others = rows
    lines = [f"| data source | {first} | {' | '.join(others)} |", "|" + "---|" * (2 + len(others))]
    for source, cell in rows[first]["by_source"].items():
        cells = [source, f"{cell['mean']:.3f}", *(_gap(rows[name]["by_source"][source]) for name in others)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(cell: Mapping[str, Any]) -> str:
    gap = cell.get("difference")
    return f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""


def draw(runs: Mapping[str, Sequence[Run]], rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Hit@1 in the batch, of a judge its hit rate over a blind one, held-out Hit@1, and the differences by data source;
    a colour a variant."""
    colors = dict(zip(runs, COLORS, strict=False)) | {RAW_ROW: RAW_COLOR}
    has_judge = any(run.curve(JUDGED) for found in runs.values() for run in found)
    panels = 4 if has_judge else 3
    figure = Figure(figsize=(5.2 * panels, 4.8), layout="constrained")
    hit, *judged, bars, gaps = figure.subplots(1, panels)
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
    _draw_bars(bars, rows, colors)
    _draw_gaps(gaps, rows, colors)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Axes, rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    for place, (name, row) in enumerate(rows.items()):
        values, mean = row["held_out_hit@1"], row["by_source"]["all"]["mean"]
        axes.bar(place, mean, width=0.62, color=colors[name])
        axes.scatter([place] * len(values), values, s=16, color="white", edgecolor="#222222", zorder=3)
        label = f"{mean:.{3 if len(rows) <= 7 else 2}f}"
        axes.annotate(label, (place, max(values)), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right", rotation_mode="anchor")
    axes.set(title="Hit@1 on held-out pairs, after RL", ylabel="share of queries", ylim=(0, 1.1))


def _draw_gaps(axes: Axes, rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """A line a data source, in the colours of the bars: left of 0 a variant finds less than the first one."""
    first, *others = rows
    sources = list(rows[first]["by_source"])
    for i, name in enumerate(others):
        shift = 0.6 * ((i + 0.5) / len(others) - 0.5)
        for place, source in enumerate(sources):
            if gap := rows[name]["by_source"][source].get("difference"):
                ends = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
                style = {"fmt": "o", "color": colors[name], "capsize": 2, "markersize": 4}
                axes.errorbar([gap["mean"]], [place + shift], xerr=ends, **style)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(sources)), sources)
    axes.set(title=f"Hit@1 more than {first}, 95% over seeds", xlabel="share of queries", xlim=(-1, 1))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)


def _mean_curve(axes: Axes, runs: Sequence[Run], key: str, color: str, **style: Any) -> None:
    if curves := [curve for run in runs if (curve := run.curve(key))]:
        mean = mean_curve(curves)
        line = smoothed(mean, max(1, len(mean) // 10) | 1)
        axes.plot(list(line), list(line.values()), color=color, **style)


def main(out: Path, variants: list[str]) -> None:
    """Print the tables; write `compare.json`, `table.md` and `curves.png` to OUT. VARIANTS: NAME=RUN[,RUN...]"""
    runs: dict[str, list[Run]] = {}
    for one in variants:
        name, _, folders = one.partition("=")
        if not name or not folders or name in runs:
            raise ConfigError(f"a variant must be NAME=RUN[,RUN...], each name once; got {one!r}")
        runs[name] = [Run(Path(folder)) for folder in folders.split(",")]
    rows = compare(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = f"{table(rows)}\n\n{source_table(rows)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(runs, rows, out / "curves.png")
    print(f"{text}\nwrote compare.json, table.md and curves.png in {out}")


if __name__ == "__main__":
    typer.run(main)
