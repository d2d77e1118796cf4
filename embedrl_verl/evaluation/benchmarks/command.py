# SPDX-License-Identifier: Apache-2.0
"""`embedrl benchmark`: runs tasks, prints their scores and the averages, and writes the leaderboard's JSON."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embedrl_verl.data.files import write_json
from embedrl_verl.data.model_files import weight_stamps
from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.benchmarks import mmeb_v2
from embedrl_verl.evaluation.benchmarks.runner import BENCHMARKS, BenchmarkRun
from embedrl_verl.evaluation.benchmarks.tables import read_tables
from embedrl_verl.evaluation.benchmarks.task import Rules, Source
from embedrl_verl.evaluation.stamp import UNKNOWN, model_facts
from embedrl_verl.export.record import public_model
from embedrl_verl.families import FAMILIES
from embedrl_verl.model.loading import Settings, check_reasoner, folder_of, read_settings
from embedrl_verl.model.options import PairOptions, placed
from embedrl_verl.platforms.cluster import Cluster
from embedrl_verl.tables import table

Files = Mapping[str, Mapping[str, Any]]
"""Score files by task."""
Averages = Callable[[Mapping[str, float]], dict[str, float]]


def run_benchmark(
    benchmark: str,
    pair: PairOptions,
    out: str,
    data_root: str,
    *,
    tasks: Sequence[str] = (),
    tcots: str | None = None,
    tables: Sequence[str] = (),
    revision: str | None = None,
    rules: Rules | None = None,
    retry_failed: bool = False,
    cluster: Cluster | None = None,
) -> None:
    """Run and print; score files, `scores.json` and `leaderboard.CELL.json` in `out`. Arguments as the command's;
    `cluster`: where tasks are computed, if not in this process."""
    if pair.reasoner is not None and tcots is not None:
        raise ConfigError("--reasoner writes T-CoTs and --tcots gives them; name one of the two")
    if bool(tables) == (benchmark in BENCHMARKS):
        raise ConfigError(f"--tables gives the tasks of mmeb_v3 and own, and of no other; got {benchmark}, {tables}")
    read = read_tables(*tables) if tables else None
    unsupported = {} if read is None else read.unsupported
    for name in tasks:
        if name in unsupported:
            raise ConfigError(f"{name} of --tables cannot be read: {unsupported[name]}")
    averages = BENCHMARKS[benchmark].averages if read is None else read.averages
    settings = read_settings(pair.embedder, pair.overrides, pair.device)
    if tcots is not None and settings.data["embedrl"]["family"] == "auto":
        raise ConfigError(
            "data.embedrl.family must say whose boxes the T-CoTs have, as --set "
            f"data.embedrl.family={FAMILIES[-1]}; got auto"
        )
    if pair.reasoner is not None:
        check_reasoner(folder_of(pair.reasoner, pair.prompts_like))
    asked = pair.prompts_like or pair.reasoner
    made_by = {
        "embedder": public_model(pair.embedder),
        "reasoner": public_model(pair.reasoner or "none"),
        # Folders of one name are told apart by their weights.
        "weights": {"embedder": weight_stamps(pair.embedder), "reasoner": weight_stamps(pair.reasoner)},
        "profile": settings.embedrl.embedder.profile,
        "evidence": dataclasses.asdict(settings.evidence(asked)),
        "prompts": _prompts(settings, asked),
    }
    # Workers of other nodes have another working directory.
    folder, root, given = os.path.abspath(out), os.path.abspath(data_root), tcots and os.path.abspath(tcots)
    run = partial(
        BenchmarkRun,
        benchmark,
        source=Source(root, revision),
        out=folder,
        rules=rules,
        tcots="write" if pair.reasoner else given,
        facts=model_facts(settings),
        made_by=made_by,
        tasks=None if read is None else read.tasks,
        retry_failed=retry_failed,
        said=print,
    )
    think = pair.think(None)
    found, left = run(partial(pair.load, think)).look(tasks)
    if left:
        with placed(pair, cluster, [folder, root, *([given] if given else [])]) as (known, place):
            found = run(partial(known.load, think)).run(tasks, place.run, place.workers)
    report = {cell: benchmark_scores(averages, found, cell) for cell in cells_of(found)}
    write_json(Path(out) / "scores.json", report)
    for cell in report if benchmark == mmeb_v2.NAME else ():
        write_json(Path(out) / f"leaderboard.{cell}.json", leaderboard(found, cell, public_model(pair.embedder)))
    print("\n".join(report_lines(found, report)))
    for name, reason in unsupported.items():
        print(f"not run: {name}: {reason}")


def _prompts(settings: Settings, path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    media, length = settings.asked(path)
    return {**dataclasses.asdict(media), "max_response_length": length}


def cells_of(files: Files) -> list[str]:
    """The cells that any task has."""
    return list(dict.fromkeys(cell for file in files.values() for cell in file["cells"]))


def benchmark_scores(averages: Averages, files: Files, cell: str) -> dict[str, dict[str, float]]:
    """x100, of the tasks that have this cell: "tasks", and the "averages" of which all tasks do."""
    scores = {name: 100 * file["cells"][cell]["score"] for name, file in files.items() if cell in file["cells"]}
    return {"tasks": scores, "averages": averages(scores)}


def leaderboard(files: Files, cell: str, name: str) -> dict[str, Any]:
    """The file that the MMEB-V2 leaderboard takes; what is not known of the model is null."""
    metadata = {
        "model_name": name,
        **dict.fromkeys(("model_backbone", "model_size", "embedding_dimension", "max_length_tokens")),
        "model_release_date": None,
        "data_source": "self-reported",
        "url": None,
        "report_generated_date": datetime.date.today().isoformat(),
    }
    metrics: dict[str, dict[str, Any]] = {modality: {} for modality in mmeb_v2.MODALITIES}
    for task, file in files.items():
        if cell in file["cells"]:
            metrics[mmeb_v2.TASKS[task].modality][mmeb_v2.official_name(task)] = file["cells"][cell]["metrics"]
    return {"metadata": metadata, "metrics": metrics}


def report_lines(files: Files, report: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Scores x100 by task and cell, the averages, and what is to be known of them."""
    averages = list(dict.fromkeys(name for one in report.values() for name in one["averages"]))
    lines = table(
        ["task", "metric", "candidates", *report],
        *(
            [name, file["metric"], file["stamp"]["candidates"], *_shown(report, "tasks", name)]
            for name, file in files.items()
        ),
        *([name, "", "", *_shown(report, "averages", name)] for name in averages),
        left=(0, 1, 2),
    )
    for name, file in files.items():
        for what in ("queries", "candidate_count"):
            count, _, of = file["stamp"][what].partition(" of ")
            if of not in (count, UNKNOWN):
                lines.append(f"ATTENTION: {name}: {what} {count}, the published set has {of}")
        for cell, one in file["cells"].items():
            if any(one["failed"].values()):
                failed = " and ".join(f"{number} {side}" for side, number in one["failed"].items())
                lines.append(
                    f"ATTENTION: {name}, {cell}: {failed} items without a vector, counted as misses; once mended, "
                    "--retry-failed computes the task again:"
                )
                lines += [f"  {problem}" for problem in one["problems"]]
            if one["optimistic"] != one["score"]:
                lines.append(f"{name}, {cell}: {100 * one['optimistic']:.2f} if ties counted for the model")
    return lines


def _shown(report: Mapping[str, Mapping[str, Mapping[str, float]]], part: str, name: str) -> list[str]:
    return [f"{cell[part][name]:.2f}" if name in cell[part] else "-" for cell in report.values()]
