# SPDX-License-Identifier: Apache-2.0
"""What the terms of a run's reward teach: their variance within GRPO's groups, by side, from the reward dumps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.data.video import even_indices
from embedrl_verl.rewards.dump import read_reward_dump
from embedrl_verl.rewards.trial import variances

MAX_DUMPS = 64
"""Read, evenly spaced over the run: a full-size step has some MB."""
SCORE = "score"


@dataclass(frozen=True)
class Term:
    """One part of the reward, or its score: by side, the variance within groups by step (mean over groups), how many
    groups have one (two rows known at least), and in how many of these it is 0."""

    name: str
    variance: dict[str, dict[int, float]] = field(default_factory=dict)
    groups: dict[Side, int] = field(default_factory=dict)
    constant: dict[Side, int] = field(default_factory=dict)

    def teaches_nothing(self) -> list[Side]:
        """The sides on which it is constant within every group."""
        return [side for side in SIDES if 0 < self.groups.get(side, 0) == self.constant[side]]


def read_terms(dumps: Sequence[tuple[str, Path]]) -> tuple[list[Term], int]:
    """The terms of some dumps, as `find_dumps` lists them, the score first; and how many dumps were read."""
    found: dict[tuple[str, Side], dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    chosen = even_indices(len(dumps), min(len(dumps), MAX_DUMPS))
    for step, path in (dumps[number] for number in chosen):
        dump = read_reward_dump(path)
        group = dump.batch.groups()
        for name, values in dump.parts.items():
            for number, side in enumerate(SIDES):
                rows = dump.batch.side == number
                if rows.any():  # a step may lie in parts, "9.0" and "9.1"
                    found[name, side][int(step.partition(".")[0])].append(variances(values[rows], group[rows]))
    terms = {name: Term(name) for name in sorted({name for name, _ in found}, key=lambda name: (name != SCORE, name))}
    for (name, side), steps in found.items():
        known = {step: one[~one.isnan()] for step, parts in steps.items() if len(one := torch.cat(parts))}
        terms[name].variance[side] = {step: float(one.mean()) for step, one in known.items() if len(one)}
        terms[name].groups[side] = sum(map(len, known.values()))
        terms[name].constant[side] = sum(int((one == 0).sum()) for one in known.values())
    return list(terms.values()), len(chosen)


def findings(terms: Sequence[Term]) -> list[str]:
    """What teaches nothing, in sentences."""
    said = []
    for term in terms:
        if sides := term.teaches_nothing():
            where = "" if len(sides) == len(SIDES) else f" on the {sides[0]} side"
            said.append(
                f"{term.name} is the same for all rollouts of every prompt{where}, so GRPO learns nothing from it."
            )
        elif term.name == SCORE and (silent := sum(term.constant.values())):
            groups = sum(term.groups.values())
            said.append(
                f"In {silent:,} of {groups:,} groups ({silent / groups:.0%}) all rollouts have the same score: GRPO "
                "learns nothing from these prompts."
            )
    return said or ["Every term varies within some groups of either side."]
