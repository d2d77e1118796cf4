# SPDX-License-Identifier: Apache-2.0
"""Co-trained against frozen: reward, Hit@1 in the batch and the anchors' Hit@1 of several runs in one plot.

A reward is paid by the run's own Embedder, so the curves of the two kinds are not in one unit once the Embedder has
moved; the held-out table beside it, where both Reasoners are read by both Embedders, compares them.

Command: `python -m embedrl_verl.tiny.cotraining_plot --frozen DIR ... --trained DIR ... --out FILE.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from embedrl_verl.errors import DataError
from embedrl_verl.progress import read_metrics

PANELS = {
    "embedrl/reward/mean": "reward (own Embedder)",
    "embedrl/hit@1/mean": "Hit@1 in the batch",
    "embedder/anchor_hit@1": "Hit@1 of the anchors",
}
COLORS = {"frozen": "#9aa5b1", "co-trained": "#2b6cb0"}
WINDOW = 5


def smoothed(values: Sequence[float]) -> list[float]:
    """Trailing mean over `WINDOW` steps."""
    return [
        sum(values[max(0, i - WINDOW + 1) : i + 1]) / len(values[max(0, i - WINDOW + 1) : i + 1])
        for i in range(len(values))
    ]


def draw(runs: Mapping[str, Sequence[Path]], out: Path) -> None:
    """One panel a metric, one line a run, a colour a kind.

    Raises:
        DataError: a run without metrics.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for kind, folders in runs.items():
        for number, folder in enumerate(folders):
            metrics = read_metrics(folder / "metrics.jsonl")
            if not metrics:
                raise DataError(f"{folder}/metrics.jsonl is missing or empty: let the run finish")
            for axis, name in zip(axes, PANELS, strict=True):
                points = [(step, row[name]) for step, row in sorted(metrics.items()) if name in row and step > 0]
                if points:
                    label = kind if number == 0 else None
                    steps, values = zip(*points, strict=True)
                    axis.plot(steps, smoothed(values), color=COLORS[kind], label=label, alpha=0.85)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the plot."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.cotraining_plot", description=draw.__doc__)
    parser.add_argument("--frozen", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--trained", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args(argv)
    draw({"frozen": arguments.frozen, "co-trained": arguments.trained}, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
