# SPDX-License-Identifier: Apache-2.0
"""The end of recipes/run_embedder_tiny_cpu.sh: held-out Hit@1 of the Embedder with T-CoTs beside the one without.

    python benchmarks/stage1_table.py RUN [RUN ...]

A run folder holds `with_tcot/metrics.jsonl` and `without/metrics.jsonl`. Several runs (seeds): the mean, and a 95%
interval of the gain over the paired runs (Student's t).
"""

from __future__ import annotations

import statistics
from pathlib import Path

import typer

from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.stats import mean_interval
from embedrl_verl.progress import read_metrics

WAYS = {"with_tcot": "with T-CoT and evidence", "without": "input alone"}


def last_scores(file: Path) -> tuple[int, dict[str, float]]:
    """Update and Hit@1 by source of the last validation in a metrics file."""
    for step, metrics in sorted(read_metrics(file).items(), reverse=True):
        split = {tuple(name.split("/")): value for name, value in metrics.items()}
        scores = {key[1]: value for key, value in split.items() if key[0] == "val-core" and key[-1] == "hit@1"}
        if scores:
            return step, scores
    raise DataError(f"{file} is missing or has no validation; set contrastive.test_freq or let the run finish")


def table(folders: list[Path]) -> str:
    """The markdown table of some runs."""
    runs = []
    for folder in folders:
        scores = {way: last_scores(folder / way / "metrics.jsonl") for way in WAYS}
        if len({step for step, _ in scores.values()}) > 1:
            raise DataError(f"{folder}: the two Embedders must have as many updates; got {scores}")
        runs.append({way: values for way, (_, values) in scores.items()})
    lines = [f"| source | {' | '.join(WAYS.values())} | gain |", "|---|---|---|---|"]
    for source in sorted(runs[0]["without"], key=lambda source: (source == "all", source)):
        with_tcot, without = ([run[way][source] for run in runs] for way in WAYS)
        gains = [a - b for a, b in zip(with_tcot, without, strict=True)]
        gain = f"{statistics.fmean(gains):+.3f}"
        if len(runs) > 1:
            _, low, high = mean_interval(gains)
            gain += f" ({low:+.3f} to {high:+.3f})"
        lines.append(f"| {source} | {statistics.fmean(with_tcot):.3f} | {statistics.fmean(without):.3f} | {gain} |")
    runs_text = f"mean of {len(runs)} runs, 95% t interval of the paired gain" if len(runs) > 1 else "one run"
    return "\n".join([*lines, "", f"Held-out Hit@1, {runs_text}."])


def main(run: list[Path]) -> None:
    """Print the table."""
    print(table(run))


if __name__ == "__main__":
    typer.run(main)
