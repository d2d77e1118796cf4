# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: what would be started, with which numbers, without starting anything.

    DRY_RUN=1 bash recipes/run_egrl_qwen2vl.sh            # a recipe's plan
    python -m embedrl_verl.plan [--config-name NAME] [hydra overrides]

The configuration is composed and checked as by a run. Devices are only counted in it, so a plan for 4 nodes of 8 GPUs
can be made on a laptop. Files that are not there are marked, not refused: a plan may be made on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedrl_verl.config.batch import BatchPlan
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.plan.lines import batch_lines, device_lines, file_lines, needs_lines, training_lines
from embedrl_verl.plan.memory import memory_lines
from embedrl_verl.plan.preflight import preflight, reasoner_type


@dataclass(frozen=True)
class Plan:
    """A checked run as lines of (topic, text)."""

    batch: BatchPlan
    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(topic) for topic, _ in self.lines) + 2
        head = "EG-RL plan (checked by verl's validator; nothing is started)"
        return "\n".join([head, *(f"  {topic.ljust(width)}{text}" for topic, text in self.lines)])


def make_plan(config: Any) -> Plan:
    """Check a composed configuration and write out what it would do; errors are those of `preflight`."""
    section, batch = preflight(config, starts=False), BatchPlan.of(config)
    named = MediaConfig.from_config(config.data).family
    family = named if named != "auto" else reasoner_type(config)
    lines = (
        *device_lines(config, batch, section),
        *batch_lines(config, batch),
        *training_lines(config),
        *memory_lines(config, batch, section),
        *file_lines(config, batch, section, family),
        *needs_lines(config),
    )
    return Plan(batch, lines)


def print_plan(config: Any) -> None:
    """Print the plan of a composed configuration to standard output."""
    print(make_plan(config))
