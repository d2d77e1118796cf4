# SPDX-License-Identifier: Apache-2.0
"""Stamps of score files: everything that makes two scores of one task incomparable, by name.

Each switch is worth points (up to seven): pages of the fixed sets or the old ones, local or global candidates, frames,
where the instruction stands, the hidden state before or after the last norm, pixels, white space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from embedrl_verl.evaluation.benchmarks.task import Rules, Task
from embedrl_verl.evaluation.stamp import UNKNOWN, ModelFacts


@dataclass(frozen=True)
class Stamp:
    """Of one score file. `data`: digest of the rows that were read; `task`: how they were (`Task.said`); `queries`
    and `candidate_count` (of a query if local, the most): "N of M", which the published set has."""

    benchmark: str
    revision: str
    data: str
    task: str
    queries: str
    pages: str
    candidates: str
    candidate_count: str
    frame_rule: str
    candidate_instruction: str
    white_space: str
    instruction_place: str
    hidden_state: str
    pixel_budget: str

    @classmethod
    def of(
        cls,
        benchmark: str,
        task: Task,
        rules: Rules,
        model: ModelFacts,
        *,
        data: str | None,
        revision: str | None,
        queries: int = 0,
        candidates: int = 0,
    ) -> Stamp:
        """Of a task that was scored under these rules."""
        is_local = task.is_local and rules.pool == "table"
        return cls(
            benchmark=benchmark,
            revision=revision or "as found",
            data=data or "",
            task=task.said(),
            queries=f"{queries} of {task.queries or UNKNOWN}",
            pages="fixed" if task.repo.endswith("-page-fixed") else "not concerned",
            candidates="local" if is_local else "global",
            candidate_count=f"{candidates} of {(is_local == task.is_local and task.candidates) or UNKNOWN}",
            frame_rule=f"{rules.frames} at int(linspace), of files evenly; short clips {rules.short_clips}",
            candidate_instruction=rules.candidate_instruction,
            white_space=rules.white_space,
            **asdict(model),
        )
