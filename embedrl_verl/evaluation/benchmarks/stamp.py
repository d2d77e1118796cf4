# SPDX-License-Identifier: Apache-2.0
"""Stamps of score files: everything that makes two scores of one task incomparable, by name.

Each switch is worth points (up to seven): pages of the fixed sets or the old ones, local or global candidates, frames,
where the instruction stands, the hidden state before or after the last norm, pixels, white space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.benchmarks.task import Rules, Task

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ModelFacts:
    """What a score file says of how the Embedder was asked.

    Attributes:
        instruction_place: the turn that holds the instruction.
        hidden_state: that is pooled.
        pixel_budget: of images and frames.
    """

    instruction_place: str = UNKNOWN
    hidden_state: str = UNKNOWN
    pixel_budget: str = UNKNOWN


@dataclass(frozen=True)
class Stamp:
    """Of one score file. `data`: digest of the rows that were read; `queries` and `candidate_count` (of a query if
    local, the most): "N of M", which the published set has."""

    benchmark: str
    revision: str
    data: str
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
            queries=f"{queries} of {task.queries or UNKNOWN}",
            pages="fixed" if task.repo.endswith("-page-fixed") else "not concerned",
            candidates="local" if is_local else "global",
            candidate_count=f"{candidates} of {(is_local == task.is_local and task.candidates) or UNKNOWN}",
            frame_rule=f"{rules.frames} at int(linspace), of files evenly; short clips {rules.short_clips}",
            candidate_instruction=rules.candidate_instruction,
            white_space=rules.white_space,
            **asdict(model),
        )


def refuse_other_stamp(
    one: Mapping[str, str], other: Mapping[str, str], where: str, *, but: tuple[str, ...] = ()
) -> None:
    """ConfigError that names the first stamp that differs, or that one of two score files lacks.

    Args:
        where: what the two are, for the message.
        but: stamps that may differ.
    """
    for name in (field.name for field in fields(Stamp)):
        if name not in but and one.get(name) != other.get(name):
            raise ConfigError(
                f"{where} must have equal stamps to be compared; {name} is {one.get(name)!r} and {other.get(name)!r}"
            )
