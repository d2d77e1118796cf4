# SPDX-License-Identifier: Apache-2.0
"""What the folder of a run or of an evaluation tells about it, in sections of sentences, tables and charts; what is not
in the folder is named, never made up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from embedrl_verl.data.files import read_object
from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.comparison import (
    RAW,
    Views,
    hit1_interval,
    interval_words,
    source_rows,
    sources_of,
    verdict,
)
from embedrl_verl.evaluation.retrieval import ALL
from embedrl_verl.progress import read_metrics
from embedrl_verl.report.chart import Chart, draw
from embedrl_verl.report.terms import findings, read_terms
from embedrl_verl.report.views import Facts
from embedrl_verl.rewards.dump import find_dumps

METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
Curve = Mapping[int, float]
SHARE = (0.0, 1.0)
CURVES: tuple[tuple[str, tuple[float, float] | None, dict[str, str]], ...] = (
    ("Reward", None, {"mean of the step": "embedrl/reward/mean"}),
    ("Hit@1", SHARE, {"in the batch": "embedrl/hit@1/mean", "validation": "val-core/all/hit@1"}),
    ("Well-formed T-CoTs", SHARE, {side: f"embedrl/well_formed/{side}" for side in SIDES}),
    ("Response length, tokens", None, {"mean": "response_length/mean", "longest": "response_length/max"}),
    ("KL to the first Reasoner", None, {"KL": "actor/kl_loss"}),
    (
        "Seconds a step",
        None,
        {
            "step": "timing_s/step",
            "rollouts": "timing_s/gen",
            "reward": "timing_s/reward_stage",
            "update": "timing_s/update_actor",
        },
    ),
)
"""Title, ends of the axis, and names of the metrics."""
SETTINGS = {
    "reward_function": "reward",
    "pairs_per_step": "pairs a step",
    "rollouts": "rollouts a prompt",
    "lr": "learning rate",
    "kl_loss_coef": "KL",
    "clip_ratio": "clip",
    "temperature": "temperature",
    "max_prompt_length": "prompt, tokens",
    "max_response_length": "response, tokens",
    "seed": "seed",
}
"""Those that matter, as `training.json` and this page call them."""
TITLES = {RAW: "plain", "truth": "true T-CoT"}
WORDS = {
    "better": ("better in", "help in"),
    "unclear": ("not clearly different in", "do not clearly help in"),
    "WORSE": ("WORSE in", "do HARM in"),
    "too few queries": ("not known, of too few queries, in", "have too few queries in"),
}
"""For each verdict, of a view against another, and of T-CoTs against the input alone."""


@dataclass(frozen=True)
class Section:
    """A part of the report; a table is rows of cells, the head first; charts are in groups."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Sequence[Sequence[object]]] = ()
    charts: Sequence[Sequence[Chart]] = ()


@dataclass(frozen=True)
class RunView:
    """What a folder tells: what the run is, its sections, and what is missing."""

    facts: Facts
    sections: Sequence[Section]
    missing: Sequence[str]


def read_run(folder: Path) -> RunView:
    """Read the folder of a run or of an evaluation; DataError if it is neither."""
    metrics = read_metrics(folder / METRICS)
    evaluation = read_object(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    if not (metrics or evaluation):
        raise DataError(f"{folder} has neither {METRICS} nor {EVALUATION}; name the folder of a run or of embedrl eval")
    facts, sections, missing = [("folder", str(folder))], list[Section](), list[str]()
    if metrics:
        facts += _settings(folder, missing) + _course(metrics)
        sections += [_curves(metrics, missing), _terms(folder, metrics, missing)]
    else:
        missing.append(f"the training: there is no {METRICS}, so this is the report of an evaluation alone.")
    if evaluation:
        facts.append(("evaluated", f"{evaluation['pairs']:,} pairs of {len(evaluation['queries'])} sources"))
        sections.append(_by_source(evaluation["views"]))
    else:
        missing.append(
            f"plain against before and after: there is no {EVALUATION}; `embedrl eval --out FOLDER` writes one, and "
            "`embedrl report FOLDER` shows it."
        )
        sections.append(_validation(metrics, missing))
    return RunView(tuple(facts), sections, missing)


def _settings(folder: Path, missing: list[str]) -> list[tuple[str, str]]:
    """Of the newest checkpoint."""
    found = [*folder.glob("checkpoints/global_step_*/training.json")]
    found += folder.glob("*/checkpoints/global_step_*/training.json")
    if not found:
        missing.append("models, data and settings: no checkpoint here has a training.json.")
        return []
    told = max(map(read_object, found), key=lambda one: int(one["step"]))
    settings, data = told["settings"], told.get("data") or []
    sources = ", ".join(f"{one['source']} {one['pairs']:,}" for one in data[:8])
    facts = {
        "Reasoner": told.get("base_model"),
        "Embedder": settings.get("embedder"),
        "the Embedder is": "co-trained" if settings.get("embedder_trained") else "frozen",
        "training pairs": f"{sources}{f' and {len(data) - 8} more sources' if len(data) > 8 else ''}",
    }
    facts |= {title: settings.get(name) for name, title in SETTINGS.items()}
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _course(metrics: Mapping[int, Mapping[str, float]]) -> list[tuple[str, str]]:
    seconds, last = curve(metrics, "timing_s/step"), max(metrics)
    total = curve(metrics, "embedrl/total_steps")
    facts = [("steps", f"{last:,}{f' of {total[max(total)]:,.0f}' if total else ''}")]
    if seconds:
        facts.append(("time", f"{_duration(sum(seconds.values()))}, {statistics.fmean(seconds.values()):.1f} s a step"))
    return facts


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def curve(metrics: Mapping[int, Mapping[str, float | None]], key: str) -> Curve:
    """A metric by step; steps without it, or where it was no finite number, are left out."""
    return {step: value for step, row in metrics.items() if (value := row.get(key)) is not None}


def _named(metrics: Mapping[int, Mapping[str, float]], start: str, end: str = "") -> list[str]:
    """What stands between `start` and `end` in the names of metrics that have both."""
    keys = dict.fromkeys(key for row in metrics.values() for key in row if key.startswith(start) and key.endswith(end))
    return [key.removeprefix(start).removesuffix(end) for key in keys]


def _curves(metrics: Mapping[int, Mapping[str, float]], missing: list[str]) -> Section:
    charts = []
    for title, bounds, keys in CURVES:
        chart = draw(title, {name: curve(metrics, key) for name, key in keys.items()}, bounds)
        if chart is None:
            missing.append(f"{title}: no step has {' or '.join(keys.values())}.")
        else:
            charts.append(chart)
    said = "By step; a thick line over a faint one is a mean of neighbouring steps, and numbers are the last value."
    return Section("Curves", [said], charts=[charts])


def _terms(folder: Path, metrics: Mapping[int, Mapping[str, float]], missing: list[str]) -> Section:
    """Of the reward: each term's mean by side, and its variance within groups."""
    title = "What the reward paid for"
    means = {
        name: draw(f"{name}, mean by side", {side: curve(metrics, f"embedrl/{name}/{side}") for side in SIDES})
        for name in _named(metrics, "embedrl/unknown/")
    }
    shown = [chart for chart in means.values() if chart]
    try:
        terms, read = read_terms(dumps := find_dumps(folder))
    except DataError as error:
        missing.append(f"variance within groups: {error}.")
        return Section(title, charts=[shown])
    said = [
        f"A group is the rollouts of one prompt. GRPO compares them with one another alone, so a term that is constant "
        f"within a group teaches nothing there. From {read:,} of {len(dumps):,} dumped steps:",
        *findings(terms),
    ]
    head = [name for side in SIDES for name in (f"variance within groups, {side}", f"constant groups, {side}")]
    table: list[list[object]] = [["term", *head]]
    for term in terms:
        cells = []
        for side in SIDES:
            values, groups = term.variance.get(side, {}).values(), term.groups.get(side, 0)
            cells += [f"{statistics.fmean(values):.3g}" if values else "unknown"]
            cells += [f"{term.constant[side] / groups:.0%}" if groups else "unknown"]
        table.append([term.name, *cells])
    spread = [draw(f"{term.name}, variance within groups", term.variance) for term in terms]
    return Section(title, said, [table], [shown, [chart for chart in spread if chart]])


def _by_source(views: Views) -> Section:
    """Tables of Hit@1, and where T-CoTs do not help."""
    names = {view: TITLES.get(view, view) for view in views}
    tried = [view for view in views if view not in TITLES]
    gains = [(view, RAW) for view in tried] + ([(tried[-1], tried[0])] if len(tried) > 1 else [])
    said = ["Every query against all targets of its data source. A gain counts if its 95% interval leaves out 0."]
    for view, base in gains:
        gain = hit1_interval([views], view, base)
        kinds: dict[str, list[str]] = {kind: [] for kind in WORDS}
        for source in sources_of(views):
            kinds[verdict(hit1_interval([views], view, base, source))].append(source)
        found = [f"{WORDS[kind][base == RAW]} {', '.join(sources)}" for kind, sources in kinds.items() if sources]
        said.append(
            f"{names[view]} against {names[base]}: {gain.mean:+.3f} ({interval_words(gain)}), "
            f"{verdict(gain)}. {'T-CoTs' if base == RAW else 'It is'} {'; '.join(found)}."
        )
    for view, scores in views.items():
        if scores.get("failed_rows"):
            said.append(f"{names[view]}: {scores['failed_rows']} inputs without a vector, counted as misses.")
    return Section("Hit@1 by data source", said, [source_rows([views], names, gains)])


def _validation(metrics: Mapping[int, Mapping[str, float]], missing: list[str]) -> Section:
    """Of a run that nobody has evaluated: its first and its last validation, without a plain view and intervals."""
    curves = {source: curve(metrics, f"val-core/{source}/hit@1") for source in _named(metrics, "val-core/", "/hit@1")}
    curves = {source: found for source, found in curves.items() if found}
    if not curves:
        missing.append("Hit@1 by data source: no step was validated.")
        return Section("Hit@1 by data source")
    first, last = min(map(min, curves.values())), max(map(max, curves.values()))
    rows = [
        [unquote(source), *(f"{found[step]:.3f}" if step in found else "unknown" for step in (first, last))]
        for source, found in sorted(curves.items(), key=lambda one: (one[0] == ALL, one[0]))
    ]
    said = ["Of the run's own validation. It keeps no single hits, so there are no intervals: a gain may be chance."]
    return Section("Hit@1 by data source", said, [[["source", f"step {first}", f"step {last}"], *rows]])
