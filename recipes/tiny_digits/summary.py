# SPDX-License-Identifier: Apache-2.0
"""The end of a tiny run: a table in the terminal, `results.json` and `curves.png`; of several seeds, with intervals.

Reads what the stages left in a run folder: `metrics.jsonl` (verl's logger `file`) and `evaluation.json`. A difference
counts as one only if its 95% interval leaves out zero (embedrl_verl/evaluation/comparison.py). What did not improve is
said, for each data source too.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.comparison import hit1_interval, interval_words, source_table, verdict
from embedrl_verl.evaluation.stats import Interval, mean_interval
from embedrl_verl.progress import read_metrics
from embedrl_verl.tables import table as columns
from recipes.tiny_digits.settings import run_program

REWARD, HIT1, VAL_HIT1 = "embedrl/reward/mean", "embedrl/hit@1/mean", "val-core/all/hit@1"
STEP_SECONDS, REWARD_SECONDS = "timing_s/step", "timing_s/reward_stage"
VIEWS = {"raw": "raw input", "before": "T-CoT before RL", "after": "T-CoT after RL", "truth": "true T-CoT"}
PAIRS = (("after", "before"), ("after", "raw"), ("before", "raw"))
COLORS = {"raw": "#9aa5b1", "before": "#e39b4c", "after": "#2b6cb0", "truth": "#38805a"}
SEED_COLORS = ("#2b6cb0", "#c05621", "#38805a", "#805ad5", "#b83280", "#2c7a7b")


class Run:
    """One run folder: its name, metrics by step, and the held-out evaluation."""

    def __init__(self, folder: Path) -> None:
        for name in ("metrics.jsonl", "evaluation.json"):
            if not (folder / name).is_file():
                raise DataError(f"a run folder must hold {name}; {folder} has none: let the run finish")
        self.name = folder.resolve().name
        self.metrics = read_metrics(folder / "metrics.jsonl")
        self.evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        self.views: dict[str, dict[str, Any]] = self.evaluation["views"]
        if not self.curve(REWARD):
            raise DataError(f"{folder}/metrics.jsonl must have a training step with {REWARD}; it has none")

    def curve(self, key: str, *, first_step: int = 1) -> dict[int, float]:
        """A metric by step; steps without it are left out."""
        return {step: row[key] for step, row in sorted(self.metrics.items()) if step >= first_step and key in row}

    def tenths(self, key: str) -> tuple[float, float] | None:
        """Mean of a metric over the first and the last tenth of the steps; None where it was never logged."""
        values = list(self.curve(key).values())
        tenth = max(1, len(values) // 10)
        return (statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])) if values else None

    def numbers(self) -> dict[str, float]:
        """Everything about the run that is one number; shares in [0, 1], times in seconds."""
        result: dict[str, float] = {}
        for view, scores in self.views.items():
            result[f"hit@1/{view}"], result[f"ndcg@5/{view}"] = scores["hit1"]["all"], scores["ndcg5"]["all"]
            if scores["quality"] is not None:
                result[f"well_formed/{view}"] = scores["quality"]["well_formed"]
                if "exact" in scores["quality"]:
                    result[f"answers_right/{view}"] = scores["quality"]["exact"]
        for name, key in (("reward", REWARD), ("hit@1_in_batch", HIT1)):
            if tenths := self.tenths(key):
                result[f"{name}/first_tenth"], result[f"{name}/last_tenth"] = tenths
        result["steps"] = float(len(self.curve(REWARD)))
        seconds, reward_seconds = self.curve(STEP_SECONDS), self.curve(REWARD_SECONDS)
        if seconds:
            result["seconds_per_step"] = statistics.fmean(seconds.values())
            both = [step for step in seconds if step in reward_seconds]
            if both:
                result["reward_stage_share"] = sum(reward_seconds[i] for i in both) / sum(seconds[i] for i in both)
        result["failed_rows"] = float(sum(view["failed_rows"] for view in self.views.values()))
        return result


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    several, views = len(runs) > 1, [run.views for run in runs]
    numbers = [run.numbers() for run in runs]
    shared = [key for key in numbers[0] if all(key in row for row in numbers)]
    result: dict[str, Any] = {
        "runs": {
            run.name: {
                **row,
                "seed": run.evaluation["seed"],
                "hit@1_by_source": {view: scores["hit1"] for view, scores in run.views.items()},
                "ndcg@5_by_source": {view: scores["ndcg5"] for view, scores in run.views.items()},
                "validation_hit@1": run.curve(VAL_HIT1, first_step=0),
            }
            for run, row in zip(runs, numbers, strict=True)
        },
        "over_runs": {key: mean_interval([row[key] for row in numbers])._asdict() for key in shared if several},
        "interval": "95%, Student's t over runs" if several else "95%, bootstrap over the queries of the one run",
        "hit@1_differences": {f"{a} - {b}": _stored(hit1_interval(views, a, b)) for a, b in PAIRS},
        "hit@1_differences_by_source": {
            source: {f"{a} - {b}": _stored(hit1_interval(views, a, b, source)) for a, b in PAIRS}
            for source in _sources(runs)
        },
    }
    return result | {"findings": _findings(result)}


def _stored(gain: Interval) -> dict[str, float | None]:
    """JSON has no NaN: the ends are null where there are too few queries for an interval."""
    return {name: None if math.isnan(value) else value for name, value in gain._asdict().items()}


def _interval(stored: Mapping[str, float | None]) -> Interval:
    return Interval(**{name: math.nan if value is None else value for name, value in stored.items()})


def _sources(runs: Sequence[Run]) -> list[str]:
    return [source for source in runs[0].views["raw"]["hit1"] if source != "all"]


def _findings(result: Mapping[str, Any]) -> list[str]:
    runs = result["runs"]
    over = f"over {len(runs)} runs" if len(runs) > 1 else "over the queries of one run"
    lines = []
    for a, b in PAIRS:
        gain = _interval(result["hit@1_differences"][f"{a} - {b}"])
        said = verdict(gain).replace("unclear", "NO CLEAR DIFFERENCE, the interval holds 0")
        lines.append(f"Hit@1, {VIEWS[a]} against {VIEWS[b]}: {gain.mean:+.3f} ({interval_words(gain)} {over}): {said}")
    by_source: dict[str, list[str]] = {"better": [], "unclear": [], "WORSE": [], "too few queries": []}
    for source, gains in result["hit@1_differences_by_source"].items():
        by_source[verdict(_interval(gains["after - raw"]))].append(source)
    found = "; ".join(f"{word} in {', '.join(names)}" for word, names in by_source.items() if names)
    lines.append(f"By data source, {VIEWS['after']} against {VIEWS['raw']}: {found}")
    rises = {name: run["reward/last_tenth"] - run["reward/first_tenth"] for name, run in runs.items()}
    still = [name for name, rise in rises.items() if rise <= 0]
    gains = ", ".join(f"{rise:+.3f}" for rise in rises.values())
    end = f"; it did NOT rise in {', '.join(still)}" if still else ""
    lines.append(f"Reward: last tenth above first tenth in {len(runs) - len(still)} of {len(runs)} runs ({gains}){end}")
    failed = {name: int(run["failed_rows"]) for name, run in runs.items() if run["failed_rows"]}
    if failed:
        lines.append(f"ATTENTION: inputs without an embedding, counted as misses: {failed}")
    return lines


# Columns of the table: the two lines of their heads, and the number.
COLUMNS = (
    *((("Hit@1", "raw"), "hit@1/raw"), (("", "before"), "hit@1/before")),
    *((("", "after"), "hit@1/after"), (("", "true"), "hit@1/truth")),
    *((("NDCG@5", "raw"), "ndcg@5/raw"), (("", "before"), "ndcg@5/before"), (("", "after"), "ndcg@5/after")),
    *((("reward", "first"), "reward/first_tenth"), (("", "last"), "reward/last_tenth")),
    *((("answers", "before"), "answers_right/before"), (("right", "after"), "answers_right/after")),
    *((("s a", "step"), "seconds_per_step"), (("reward", "stage"), "reward_stage_share")),
)
FORMATS = {"reward_stage_share": "{:.1%}", "seconds_per_step": "{:.2f}"}


def table(runs: Sequence[Run], result: Mapping[str, Any]) -> str:
    """The text for the terminal: runs, data sources, findings."""
    over, rows = result["over_runs"], dict(result["runs"])
    if over:
        rows["mean"] = {key: value["mean"] for key, value in over.items()}
        rows["95% ±"] = {key: (value["high"] - value["low"]) / 2 for key, value in over.items()}
    shown = [(head, key) for head, key in COLUMNS if any(key in row for row in rows.values())]
    cells = [
        [name, *(FORMATS.get(key, "{:.3f}").format(row[key]) if key in row else "-" for _, key in shown)]
        for name, row in rows.items()
    ]
    lines = columns(["", *(head[0] for head, _ in shown)], ["run", *(head[1] for head, _ in shown)], *cells)
    several = f", mean of {len(runs)} runs" if over else ""
    return "\n".join(
        [
            "Held-out pairs: every query against all targets of its data source. first, last = tenth of the RL steps",
            *[*lines[:2], "-" * len(lines[1]), *lines[2:]],
            "",
            f"Hit@1 by data source{several}, and what T-CoTs gain, with 95% intervals",
            *source_table([run.views for run in runs], _titles(runs), "raw", ["before", "after"]),
            "",
            *result["findings"],
        ]
    )


def _titles(runs: Sequence[Run]) -> dict[str, str]:
    short = {"raw": "raw", "before": "before", "after": "after", "truth": "true"}
    return {view: title for view, title in short.items() if view in runs[0].views}


def smoothed(curve: Mapping[int, float], window: int) -> dict[int, float]:
    """Mean of the `window` steps around each one; fewer at the ends."""
    steps, values, half = list(curve), list(curve.values()), window // 2
    return {step: statistics.fmean(values[max(0, i - half) : i + half + 1]) for i, step in enumerate(steps)}


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Mean of several curves where all have a step."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Reward and Hit@1 by step; held-out Hit@1, and by data source what T-CoTs gain over the raw input, as a PNG."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (reward, hit), (bars, gains) = figure.subplots(2, 2)
    _draw_metric(reward, runs, REWARD)
    reward.set(title="Reward of the training batches", ylabel="mean reward of a step")
    _draw_metric(hit, runs, HIT1, "in the batch, ")
    for i, run in enumerate(runs):
        if points := run.curve(VAL_HIT1, first_step=0):
            label = "validation, held-out pairs" if i == 0 else None
            style = {"markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4}
            hit.plot(list(points), list(points.values()), "o--", color=_color(i), linewidth=1, label=label, **style)
    hit.set(title="Hit@1 during RL", ylabel="share of queries and targets")
    for axes in (reward, hit):
        axes.set_xlabel("RL step")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    _draw_bars(bars, runs)
    _draw_gains(gains, runs)
    for axes in (reward, hit, bars, gains):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _color(run: int) -> str:
    return SEED_COLORS[run % len(SEED_COLORS)]


def _draw_metric(axes: Axes, runs: Sequence[Run], key: str, what: str = "") -> None:
    curves = [run.curve(key) for run in runs]
    window = max(1, max(map(len, curves)) // 10) | 1
    single = len(runs) == 1
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        line = smoothed(curve, window)
        axes.plot(list(curve), list(curve.values()), color=_color(i), alpha=0.3 if single else 0.15, linewidth=1)
        label = f"{what}mean of {window} steps" if single else run.name
        axes.plot(list(line), list(line.values()), color=_color(i), linewidth=2.4 if single else 1.2, label=label)
    if not single:
        mean = smoothed(mean_curve(curves), window)
        label = f"{what}mean of runs and {window} steps"
        axes.plot(list(mean), list(mean.values()), color="black", linewidth=2.4, label=label)


def _draw_bars(axes: Axes, runs: Sequence[Run]) -> None:
    views = ["raw", "before", "after"]
    intervals = [hit1_interval([run.views for run in runs], view) for view in views]
    means = [one.mean for one in intervals]
    errors = [[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]]
    places = list(range(len(views)))
    axes.bar(places, means, width=0.62, color=[COLORS[view] for view in views])
    label = f"95% interval over {f'{len(runs)} runs' if len(runs) > 1 else 'queries'}"
    axes.errorbar(places, means, yerr=errors, fmt="none", ecolor="#222222", capsize=4, linewidth=1.2, label=label)
    for i, (view, one) in enumerate(zip(views, intervals, strict=True)):
        if len(runs) > 1:
            spread = [i + 0.3 * (k / (len(runs) - 1) - 0.5) for k in range(len(runs))]
            values = [run.numbers()[f"hit@1/{view}"] for run in runs]
            axes.scatter(spread, values, s=16, color="white", edgecolor="#222222", zorder=3, linewidth=0.9)
        above = {"textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{one.mean:.3f}", (i, max(one.high, one.mean)), (0, 5), **above)
    if all("truth" in run.views for run in runs):
        ceiling = statistics.fmean(run.numbers()["hit@1/truth"] for run in runs)
        axes.axhline(ceiling, color=COLORS["truth"], linestyle="--", linewidth=1.3, label=f"true T-CoT, {ceiling:.3f}")
    axes.set_xticks(places, [VIEWS[view].replace("T-CoT ", "T-CoT\n") for view in views])
    axes.set(title="Hit@1 on held-out pairs", ylabel="share of queries", ylim=(0, 1.19))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_gains(axes: Axes, runs: Sequence[Run]) -> None:
    """A line a data source: left of 0 the T-CoT is worse than no T-CoT."""
    sources, views = [*_sources(runs), "all"], [run.views for run in runs]
    for shift, view in ((-0.16, "before"), (0.16, "after")):
        found = [hit1_interval(views, view, "raw", source) for source in sources]
        errors = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
        places = [place + shift for place in range(len(sources))]
        means = [one.mean for one in found]
        axes.errorbar(means, places, xerr=errors, fmt="o", color=COLORS[view], capsize=3, label=VIEWS[view])
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(sources)), sources)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    over = f"{len(runs)} runs" if len(runs) > 1 else "queries"
    axes.set(title="Hit@1 against the raw input, by data source", xlabel=f"gain (95% interval over {over})")
    axes.legend(frameon=False, fontsize=9)


def main(
    run: Annotated[list[Path], typer.Argument(help="run folders, one for each seed")],
    out: Annotated[Path | None, typer.Option(help="default: the run folder, of several their parent")] = None,
) -> None:
    """Print the table, write `results.json` and `curves.png`."""
    folders = [folder.resolve() for folder in run]
    if len({folder.name for folder in folders}) < len(folders):
        raise ConfigError(f"runs must be different folders with different names; got {list(map(str, run))}")
    runs = [Run(folder) for folder in folders]
    out = out or (folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders)))
    out.mkdir(parents=True, exist_ok=True)
    result = summarise(runs)
    (out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw_curves(runs, out / "curves.png")
    print(table(runs, result))
    print(f"\nwrote {out / 'results.json'} and {out / 'curves.png'}")


if __name__ == "__main__":
    run_program(main)
