# SPDX-License-Identifier: Apache-2.0
"""The end of the tiny stage 1: held-out Hit@1 of the Embedder trained with T-CoTs beside the one trained without.

Each run folder holds `with_tcot/metrics.jsonl` and `without/metrics.jsonl`. With several runs (seeds) the mean and a
95% interval over runs (Student's t, paired for the gain) are given.

Command: `python -m embedrl_verl.tiny.stage1_table --run DIR [--run DIR ...] [--out FILE.md]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.stats import mean_interval

WAYS = {"with_tcot": "with T-CoT and evidence", "without": "input alone"}
METRIC = "hit@1"


def last_scores(file: Path) -> tuple[int, dict[str, float]]:
    """Update and Hit@1 by source of the last validation in a metrics file.

    Raises:
        DataError: there is no such file, or no validation in it.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing: let the run finish")
    found: tuple[int, dict[str, float]] | None = None
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        scores = {
            name.split("/")[1]: value
            for name, value in entry["data"].items()
            if name.startswith("val-core/") and name.endswith(f"/{METRIC}")
        }
        if scores:
            found = (int(entry["step"]), scores)
    if found is None:
        raise DataError(f"{file} has no validation; set contrastive.test_freq or let the run finish")
    return found


def table(folders: Sequence[Path]) -> str:
    """The markdown table of some runs.

    Raises:
        DataError: a file is missing, or the two Embedders of a run have not taken as many updates.
    """
    runs = []
    for folder in folders:
        scores = {way: last_scores(folder / way / "metrics.jsonl") for way in WAYS}
        if len({step for step, _ in scores.values()}) > 1:
            raise DataError(f"{folder}: the two Embedders must have as many updates; got {scores}")
        runs.append({way: values for way, (_, values) in scores.items()})
    sources = sorted(runs[0]["without"], key=lambda source: (source == "all", source))
    lines = [f"| source | {' | '.join(WAYS.values())} | gain |", "|---|---|---|---|"]
    for source in sources:
        values = {way: [run[way][source] for run in runs] for way in WAYS}
        gains = [a - b for a, b in zip(values["with_tcot"], values["without"], strict=True)]
        means = [sum(values[way]) / len(runs) for way in WAYS]
        gain = f"{sum(gains) / len(gains):+.3f}"
        if len(runs) > 1:
            _, low, high = mean_interval(gains)
            gain += f" ({low:+.3f} to {high:+.3f})"
        lines.append(f"| {source} | {means[0]:.3f} | {means[1]:.3f} | {gain} |")
    runs_text = f"mean of {len(runs)} runs, 95% t interval of the paired gain" if len(runs) > 1 else "one run"
    return "\n".join([*lines, "", f"Held-out Hit@1, {runs_text}."])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.stage1_table", description=table.__doc__)
    parser.add_argument(
        "--run", type=Path, action="append", required=True, help="a run folder; several times for seeds"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    text = table(arguments.run)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"# Stage 1 on the digits data\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
