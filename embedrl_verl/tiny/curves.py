# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: reward and in-batch Hit@1 over the steps, and held-out Hit@1 by data source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedrl_verl.tiny.runs import LABELS, REWARD, Run

IN_BATCH_HIT = "embedrl/hit@1/mean"
_COLOURS = {"raw": "#b8bec9", "before": "#7fb3d5", "after": "#1f618d"}
_REWARD, _HIT, _INK = "#1f618d", "#c0701d", "#2c3440"


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG. Of several runs each is a thin line and their mean a thick one; bars are means over runs."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": "#8a93a0", "text.color": _INK}):
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        reward, hit, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
        _draw_series(reward, runs, REWARD, "reward", _REWARD)
        _draw_series(hit, runs, IN_BATCH_HIT, "Hit@1 within the batch", _HIT)
        _draw_bars(bars, runs)
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        figure.suptitle(f"EG-RL on handwritten digits: frozen Embedder, tiny Reasoner{seeds}", fontsize=12, color=_INK)
        figure.savefig(path, dpi=150)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _draw_series(axes: Axes, runs: Sequence[Run], key: str, title: str, colour: str) -> None:
    series = [run.series(key) for run in runs]
    series = [one for one in series if one[0]]
    longest = max((len(steps) for steps, _ in series), default=0)
    window = max(1, longest // 10)
    for steps, values in series:
        axes.plot(steps, values if len(series) == 1 else smooth(values, window), color=colour, alpha=0.3, linewidth=1)
    if series:
        common = min((steps for steps, _ in series), key=len)
        means = [sum(column) / len(series) for column in zip(*(values for _, values in series), strict=False)]
        axes.plot(common, smooth(means, window), color=colour, linewidth=2.2)
    _tidy(axes, title)
    axes.set_xlabel("step")


def _draw_bars(axes: Axes, runs: Sequence[Run]) -> None:
    views = [view for view in _COLOURS if all(view in run.evaluation for run in runs)]
    sources = [source for source in runs[0].evaluation[views[0]]["hit1"] if source != "all"] + ["all"]
    width = 0.8 / len(views)
    for number, view in enumerate(views):
        heights = [sum(run.evaluation[view]["hit1"][source] for run in runs) / len(runs) for source in sources]
        places = [i + (number - (len(views) - 1) / 2) * width for i in range(len(sources))]
        axes.bar(places, heights, width=0.92 * width, color=_COLOURS[view], label=LABELS[view])
        axes.annotate(
            f"{heights[-1]:.2f}", (places[-1], heights[-1]), (0, 2), textcoords="offset points", ha="center", fontsize=8
        )
    axes.axvline(len(sources) - 1.5, color="#c8ced6", linewidth=1)
    axes.set_xticks(range(len(sources)), [source.removeprefix("digits_") for source in sources])
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(loc="upper center", ncols=len(views), frameon=False, fontsize=9)
    _tidy(axes, "held-out Hit@1 by data source")


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
