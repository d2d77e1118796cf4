# SPDX-License-Identifier: Apache-2.0
"""The end of a tiny run: a table in the terminal, `results.json` and `curves.png`; of several seeds, with intervals.

Reads what the stages left in a run folder: `metrics.jsonl` (verl's logger `file`) and `evaluation.json`
(`embedrl_verl.tiny.evaluate`). A difference counts as one only if its 95% interval leaves out zero: over seeds
Student's t on the differences of paired runs; with one run a bootstrap over its queries. What did not improve is said.

Command: `python -m embedrl_verl.tiny.summary --run DIR [--run DIR ...] [--out DIR]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.stats import Interval, bootstrap_interval, mean_interval
from embedrl_verl.progress import read_metrics

REWARD, HIT1, VAL_HIT1 = "embedrl/reward/mean", "embedrl/hit@1/mean", "val-core/all/hit@1"
STEP_SECONDS, REWARD_SECONDS = "timing_s/step", "timing_s/reward_stage"
VIEWS = {"raw": "raw input", "before": "T-CoT before RL", "after": "T-CoT after RL", "truth": "true T-CoT"}
PAIRS = (("after", "before"), ("after", "raw"), ("before", "raw"))
COLORS = {"raw": "#9aa5b1", "before": "#e39b4c", "after": "#2b6cb0", "truth": "#38805a"}
SEED_COLORS = ("#2b6cb0", "#c05621", "#38805a", "#805ad5", "#b83280", "#2c7a7b")


@dataclass(frozen=True)
class Run:
    """One run folder: its name, metrics by step, and the held-out evaluation."""

    name: str
    metrics: dict[int, dict[str, float]]
    evaluation: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            DataError: a file, a step with a reward, or a view of the evaluation is missing.
        """
        for name in ("metrics.jsonl", "evaluation.json"):
            if not (folder / name).is_file():
                raise DataError(f"a run folder must hold {name}; {folder} has none: let the run finish")
        run = cls(
            folder.resolve().name,
            read_metrics(folder / "metrics.jsonl"),
            json.loads((folder / "evaluation.json").read_text(encoding="utf-8")),
        )
        missing = [view for view in VIEWS if view not in run.evaluation["views"]]
        if missing:
            raise DataError(
                f"{folder}/evaluation.json must have the views {list(VIEWS)}; {missing} missing: see --after"
            )
        if not run.curve(REWARD):
            raise DataError(f"{folder}/metrics.jsonl must have a training step with {REWARD}; it has none")
        return run

    def curve(self, key: str, *, first_step: int = 1) -> dict[int, float]:
        """A metric by step; steps without it are left out."""
        return {step: row[key] for step, row in sorted(self.metrics.items()) if step >= first_step and key in row}

    def numbers(self) -> dict[str, float]:
        """Everything about the run that is one number; shares in [0, 1], times in seconds."""
        result: dict[str, float] = {}
        for view, scores in self.evaluation["views"].items():
            result[f"hit@1/{view}"] = scores["hit1"]["all"]
            result[f"ndcg@5/{view}"] = scores["ndcg5"]["all"]
            if scores["quality"] is not None:
                result[f"well_formed/{view}"] = scores["quality"]["well_formed"]
                result[f"answers_right/{view}"] = scores["quality"]["exact"]
        for name, key in (("reward", REWARD), ("hit@1_in_batch", HIT1)):
            values = list(self.curve(key).values())
            if values:
                tenth = max(1, len(values) // 10)
                result[f"{name}/first_tenth"] = statistics.fmean(values[:tenth])
                result[f"{name}/last_tenth"] = statistics.fmean(values[-tenth:])
        result["steps"] = float(len(self.curve(REWARD)))
        seconds, reward_seconds = self.curve(STEP_SECONDS), self.curve(REWARD_SECONDS)
        if seconds:
            result["seconds_per_step"] = statistics.fmean(seconds.values())
            shares = [(reward_seconds[step], seconds[step]) for step in seconds if step in reward_seconds]
            if shares:
                result["reward_stage_share"] = sum(one for one, _ in shares) / sum(whole for _, whole in shares)
        result["failed_rows"] = float(sum(view["failed_rows"] for view in self.evaluation["views"].values()))
        return result

    def hits(self, view: str) -> list[float]:
        """One number a query, weighted so that their mean is the plain mean over sources."""
        by_source: Mapping[str, Sequence[int]] = self.evaluation["views"][view]["hits"]
        total = sum(len(hits) for hits in by_source.values())
        return [hit * total / (len(by_source) * len(hits)) for hits in by_source.values() for hit in hits]


def interval_of(runs: Sequence[Run], view: str, minus: str | None = None) -> Interval:
    """Hit@1 of a view, or its gain over another, with a 95% interval over runs; with one run over its queries."""
    if len(runs) == 1:
        hits = runs[0].hits(view)
        return bootstrap_interval(
            hits if minus is None else [a - b for a, b in zip(hits, runs[0].hits(minus), strict=True)]
        )
    numbers = [run.numbers() for run in runs]
    return mean_interval([row[f"hit@1/{view}"] - (row[f"hit@1/{minus}"] if minus else 0.0) for row in numbers])


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    numbers = {run.name: run.numbers() for run in runs}
    shared = [key for key in numbers[runs[0].name] if all(key in row for row in numbers.values())]
    columns = {key: [row[key] for row in numbers.values()] for key in shared}
    over_runs = {key: mean_interval(values)._asdict() for key, values in columns.items()} if len(runs) > 1 else {}
    result: dict[str, Any] = {
        "runs": {
            run.name: {
                **numbers[run.name],
                "seed": run.evaluation["seed"],
                "hit@1_by_source": {view: scores["hit1"] for view, scores in run.evaluation["views"].items()},
                "ndcg@5_by_source": {view: scores["ndcg5"] for view, scores in run.evaluation["views"].items()},
                "validation_hit@1": run.curve(VAL_HIT1, first_step=0),
            }
            for run in runs
        },
        "over_runs": over_runs,
        "interval": "95%, Student's t over runs" if len(runs) > 1 else "95%, bootstrap over the queries of the one run",
        "hit@1_differences": {f"{a} - {b}": interval_of(runs, a, b)._asdict() for a, b in PAIRS},
    }
    return result | {"findings": _findings(result)}


def _findings(result: Mapping[str, Any]) -> list[str]:
    runs = result["runs"]
    over = f"over {len(runs)} runs" if len(runs) > 1 else "over the queries of one run"
    lines = []
    for a, b in PAIRS:
        gain = Interval(**result["hit@1_differences"][f"{a} - {b}"])
        verdict = (
            "better" if gain.low > 0 else "WORSE" if gain.high < 0 else "NO CLEAR DIFFERENCE, the interval holds 0"
        )
        lines.append(
            f"Hit@1, {VIEWS[a]} against {VIEWS[b]}: {gain.mean:+.3f} "
            f"(95% interval {gain.low:+.3f} to {gain.high:+.3f} {over}): {verdict}"
        )
    rises = {name: run["reward/last_tenth"] - run["reward/first_tenth"] for name, run in runs.items()}
    still = [name for name, rise in rises.items() if rise <= 0]
    gains = ", ".join(f"{rise:+.3f}" for rise in rises.values())
    end = f"; it did NOT rise in {', '.join(still)}" if still else ""
    lines.append(f"Reward: last tenth above first tenth in {len(runs) - len(still)} of {len(runs)} runs ({gains}){end}")
    failed = {name: int(run["failed_rows"]) for name, run in runs.items() if run["failed_rows"]}
    if failed:
        lines.append(f"ATTENTION: inputs without an embedding, counted as misses: {failed}")
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The text for the terminal: runs, data sources, findings."""
    heads = [("Hit@1" if i == 0 else "", name) for i, name in enumerate(("raw", "before", "after", "true"))]
    heads += [("NDCG@5" if i == 0 else "", name) for i, name in enumerate(("raw", "before", "after"))]
    heads += [("reward", "first"), ("", "last"), ("answers", "before"), ("right", "after")]
    heads += [("s a", "step"), ("reward", "stage")]
    keys = [f"hit@1/{view}" for view in VIEWS] + [f"ndcg@5/{view}" for view in ("raw", "before", "after")]
    keys += ["reward/first_tenth", "reward/last_tenth", "answers_right/before", "answers_right/after"]
    keys += ["seconds_per_step", "reward_stage_share"]

    def cells(values: Mapping[str, float]) -> list[str]:
        return [_cell(key, values[key]) if key in values else "-" for key in keys]

    runs, over = result["runs"], result["over_runs"]
    rows = [[name, *cells(run)] for name, run in runs.items()]
    if over:
        rows.append(["mean", *cells({key: value["mean"] for key, value in over.items()})])
        halves = cells({key: (value["high"] - value["low"]) / 2 for key, value in over.items()})
        rows.append(["95% ±", *halves])
    by_source = []
    for source in next(iter(runs.values()))["hit@1_by_source"]["raw"]:
        means = [statistics.fmean(run["hit@1_by_source"][view][source] for run in runs.values()) for view in VIEWS]
        by_source.append([source, *(f"{mean:.3f}" for mean in means)])
    return "\n".join(
        [
            "Held-out pairs: every query against all targets of its data source. first, last = tenth of the RL steps",
            _aligned([("", "run"), *heads], rows),
            "",
            "Hit@1 by data source" + (f", mean of {len(runs)} runs" if over else ""),
            _aligned([("", "source"), *(("", name) for name in VIEWS.values())], by_source),
            "",
            *result["findings"],
        ]
    )


def _cell(key: str, value: float) -> str:
    if key == "reward_stage_share":
        return f"{value:.1%}"
    return f"{value:.2f}" if key == "seconds_per_step" else f"{value:.3f}"


def _aligned(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Columns to the right, the first to the left, under a head of two lines (the upper one left out if empty)."""
    lines = [[head[0] for head in heads], [head[1] for head in heads], *rows]
    lines = lines if any(lines[0]) else lines[1:]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(len(lines) - len(rows), "-" * len(text[0]))
    return "\n".join(text)


def smoothed(curve: Mapping[int, float], window: int) -> dict[int, float]:
    """Mean of the `window` steps around each one; fewer at the ends."""
    steps, values, half = list(curve), list(curve.values()), window // 2
    return {step: statistics.fmean(values[max(0, i - half) : i + half + 1]) for i, step in enumerate(steps)}


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Reward and Hit@1 by step beside the held-out Hit@1, as a PNG."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    reward, hit, bars = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
    _draw_metric(reward, runs, REWARD)
    reward.set(title="Reward of the training batches", ylabel="mean reward of a step")
    _draw_metric(hit, runs, HIT1, "in the batch, ")
    for i, run in enumerate(runs):
        points = run.curve(VAL_HIT1, first_step=0)
        label = "validation, held-out pairs" if i == 0 else None
        color = SEED_COLORS[i % len(SEED_COLORS)]
        style = {"markersize": 6, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4}
        if points:
            hit.plot(list(points), list(points.values()), "o", color=color, label=label, **style)
    hit.set(title="Hit@1 during RL", ylabel="share of queries and targets")
    for axes in (reward, hit):
        axes.set_xlabel("RL step")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    _draw_bars(bars, runs)
    for axes in (reward, hit, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_metric(axes: Axes, runs: Sequence[Run], key: str, what: str = "") -> None:
    curves = [run.curve(key) for run in runs]
    window = max(1, max(map(len, curves)) // 10) | 1
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        color = SEED_COLORS[i % len(SEED_COLORS)]
        single = len(runs) == 1
        line = smoothed(curve, window)
        axes.plot(list(curve), list(curve.values()), color=color, alpha=0.3 if single else 0.15, linewidth=1)
        label = f"{what}mean of {window} steps" if single else run.name
        axes.plot(list(line), list(line.values()), color=color, linewidth=2.4 if single else 1.2, label=label)
    if len(runs) > 1:
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = smoothed({step: statistics.fmean(curve[step] for curve in curves) for step in steps}, window)
        label = f"{what}mean of runs and {window} steps"
        axes.plot(list(mean), list(mean.values()), color="black", linewidth=2.4, label=label)


def _draw_bars(axes: Axes, runs: Sequence[Run]) -> None:
    views = [view for view in VIEWS if view != "truth"]
    intervals = [interval_of(runs, view) for view in views]
    means = [one.mean for one in intervals]
    errors = [[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]]
    places = list(range(len(views)))
    axes.bar(places, means, width=0.62, color=[COLORS[view] for view in views])
    over = f"{len(runs)} runs" if len(runs) > 1 else "queries"
    label = f"95% interval over {over}"
    axes.errorbar(places, means, yerr=errors, fmt="none", ecolor="#222222", capsize=4, linewidth=1.2, label=label)
    if len(runs) > 1:
        for i, view in enumerate(views):
            spread = [i + 0.3 * (k / (len(runs) - 1) - 0.5) for k in range(len(runs))]
            values = [run.numbers()[f"hit@1/{view}"] for run in runs]
            axes.scatter(spread, values, s=16, color="white", edgecolor="#222222", zorder=3, linewidth=0.9)
    for place, one in zip(places, intervals, strict=True):
        axes.annotate(
            f"{one.mean:.3f}", (place, max(one.high, one.mean)), (0, 5), textcoords="offset points", ha="center"
        )
    ceiling = statistics.fmean(run.numbers()["hit@1/truth"] for run in runs)
    axes.axhline(ceiling, color=COLORS["truth"], linestyle="--", linewidth=1.3, label=f"true T-CoT, {ceiling:.3f}")
    axes.set_xticks(places, [VIEWS[view].replace("T-CoT ", "T-CoT\n") for view in views])
    axes.set(title="Hit@1 on held-out pairs", ylabel="share of queries", ylim=(0, 1.19))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: print the table, write `results.json` and `curves.png`."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.summary", description=summarise.__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True, help="run folder; once for each seed")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the run folder, of several their parent")
    args = parser.parse_args(argv)
    folders = [folder.resolve() for folder in args.run]
    if len({folder.name for folder in folders}) < len(folders):
        raise ConfigError(f"runs must be different folders with different names; got {[str(run) for run in args.run]}")
    runs = [Run.load(folder) for folder in folders]
    out = args.out or (folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders)))
    out.mkdir(parents=True, exist_ok=True)
    result = summarise(runs)
    (out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw_curves(runs, out / "curves.png")
    print(table(result))
    print(f"\nwrote {out / 'results.json'} and {out / 'curves.png'}")


if __name__ == "__main__":
    main()
