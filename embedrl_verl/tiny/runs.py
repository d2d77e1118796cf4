# SPDX-License-Identifier: Apache-2.0
"""A finished run's folder: `evaluation.json` (of `embedrl_verl.tiny.evaluate`) and `rl/metrics.jsonl` (verl's logger
`file`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedrl_verl.errors import DataError
from embedrl_verl.progress import read_metrics

REWARD = "embedrl/reward/mean"
LABELS = {"raw": "raw input", "before": "T-CoT before RL", "after": "T-CoT after RL", "truth": "true T-CoT (ceiling)"}


@dataclass(frozen=True)
class Run:
    """One seed.

    Attributes:
        name: of its folder.
        evaluation: view -> fields of `embedrl_verl.tiny.evaluate.View`.
        metrics: logged training metrics by step, steps from 1.
    """

    name: str
    evaluation: dict[str, dict[str, Any]]
    metrics: dict[int, dict[str, float]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was logged, and its values."""
        steps = [step for step, values in sorted(self.metrics.items()) if key in values]
        return steps, [self.metrics[step][key] for step in steps]

    def reward_tenths(self) -> tuple[float, float]:
        """Mean reward of the first and of the last tenth of the steps (at least one step each)."""
        _, rewards = self.series(REWARD)
        tenth = max(1, len(rewards) // 10)
        return sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: a file is missing, or no reward was logged.
    """
    folder = Path(folder)
    evaluation, metrics = folder / "evaluation.json", folder / "rl" / "metrics.jsonl"
    for path, stage in ((evaluation, "evaluate"), (metrics, "rl")):
        if not path.is_file():
            raise DataError(f"a run folder must hold {path.relative_to(folder)}; {folder} has none: run stage {stage}")
    steps = {step: values for step, values in read_metrics(metrics).items() if step > 0}
    run = Run(folder.name, json.loads(evaluation.read_text(encoding="utf-8")), steps)
    if not run.series(REWARD)[1]:
        raise DataError(f"{metrics} must hold {REWARD} for at least one step; found {len(steps)} steps without it")
    return run
