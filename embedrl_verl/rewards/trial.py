# SPDX-License-Identifier: Apache-2.0
"""What another reward function would change in a run: its scores beside those of a dump, and what GRPO makes of them.

`score_dump` computes one dump again, `summarise` compares over any number of them, `largest_changes` names rows.
Values in twos are (old, new): the dump's and the tried function's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedrl_verl.data.schema import SIDES
from embedrl_verl.rewards.dump import RewardDump
from embedrl_verl.rewards.score import call_reward_function

# verl's guard against a division by zero.
_EPSILON = 1e-6


@torch.no_grad()
def grpo_advantages(score: Tensor, group: Tensor, *, norm_by_std: bool = True) -> Tensor:
    """(score - mean of its group) / standard deviation of its group, as verl's `grpo` with `norm_adv_by_std_in_grpo`.

    Args:
        score: (N,) float, NaN = unknown: in training such a row is in no group and has no gradient.
        group: (N,) int, rows of one prompt share an id.
        norm_by_std: False: without the division (Dr. GRPO).

    Returns:
        (N,) float64, NaN where the score is unknown or the only known one of its group, which has nothing to be
        compared with: training leaves such a row out too (verl alone would give it its score as advantage).
    """
    score, known = score.double(), ~score.isnan()
    ids: Tensor = torch.unique(group, return_inverse=True)[1]

    def per_group(values: Tensor) -> Tensor:
        return torch.bincount(ids[known], values[known], minlength=len(score))

    size = per_group(torch.ones_like(score))
    advantage = score - (per_group(score) / size)[ids]
    if norm_by_std:
        advantage = advantage / ((per_group(advantage**2) / (size - 1)).sqrt()[ids] + _EPSILON)
    return advantage.masked_fill(~known | (size[ids] < 2), torch.nan)


@dataclass(frozen=True)
class Change:
    """One row whose training would change."""

    step: str
    pair_id: str
    data_source: str
    side: str
    rollout: int
    score: tuple[float, float]
    advantage: tuple[float, float]
    text: str


@dataclass(frozen=True)
class ScoredStep:
    """A trial on one dump of N rows, NaN = unknown.

    `side`, `group`: (N,) int64, rows of one prompt share a group. `score`: (N,) float32; `advantage`: (N,) float64,
    GRPO's. `parts`: what the function returned. `changes`: the rows whose advantage changes most, largest first.
    """

    step: str
    side: Tensor
    group: Tensor
    score: tuple[Tensor, Tensor]
    advantage: tuple[Tensor, Tensor]
    parts: dict[str, Tensor]
    changes: list[Change]


@dataclass(frozen=True)
class Summary:
    """Numbers over the rows of one or several steps. None: no such number (no known row, or nothing varies).

    mean: of the scores by side ("query", "target", "mean").
    unknown: rows without score. identical: every score is the same, bit for bit.
    correlation, advantage_correlation: of old and new, over rows with a score, or an advantage, in both (Pearson).
    sign_flips: share of the rows with an advantage in both whose sign is the opposite.
    no_signal: share of the groups whose rows all have advantage 0 or unknown.
    parts: mean of every part of the tried function.
    """

    step: str
    rows: int
    groups: int
    mean: dict[str, tuple[float | None, float | None]]
    unknown: tuple[int, int]
    identical: bool
    correlation: float | None
    advantage_correlation: float | None
    sign_flips: float | None
    no_signal: tuple[float, float]
    parts: dict[str, float | None] = field(default_factory=dict)


def score_dump(
    function: Callable[..., Any], where: str, dump: RewardDump, *, step: str = "", limit: int = 5
) -> ScoredStep:
    """Call a reward function (named `where`) on a dump, errors as `call_reward_function`; name up to `limit` rows."""
    batch = dump.batch()
    parts = call_reward_function(function, batch, where)
    group, score = batch.groups(), (dump.parts["score"], parts["score"])
    old, new = (grpo_advantages(one, group) for one in score)
    changed = (new - old).abs().nan_to_num(nan=0.0)
    order = changed.argsort(descending=True, stable=True)[: min(limit, int((changed > 0).sum()))]
    changes = [
        Change(
            step=step,
            pair_id=str(dump.rows[row]["pair_id"]),
            data_source=str(dump.rows[row]["data_source"]),
            side=SIDES[int(batch.side[row])],
            rollout=int(batch.rollout[row]),
            score=(float(score[0][row]), float(score[1][row])),
            advantage=(float(old[row]), float(new[row])),
            text=dump.rows[row]["text"],
        )
        for row in order.tolist()
    ]
    return ScoredStep(step, batch.side, group, score, (old, new), parts, changes)


def summarise(scored: Sequence[ScoredStep], step: str) -> Summary:
    """Compare old and new over all rows of `scored`, which is not empty; `step` names them."""
    side = torch.cat([one.side for one in scored])
    old, new = (torch.cat([one.score[which] for one in scored]) for which in (0, 1))
    before, after = (torch.cat([one.advantage[which] for one in scored]) for which in (0, 1))
    selections: dict[str, Tensor] = {name: side == number for number, name in enumerate(SIDES)}
    selections["mean"] = torch.ones_like(side, dtype=torch.bool)
    scored_both = ~old.isnan() & ~new.isnan()
    both = ~before.isnan() & ~after.isnan()  # not those that are alone in their group
    groups = sum(_distinct(one.group) for one in scored)
    moving = [
        sum(_distinct(one.group[one.advantage[which].nan_to_num(nan=0.0) != 0]) for one in scored) for which in (0, 1)
    ]
    names = [name for name in scored[0].parts if name != "score" and all(name in one.parts for one in scored)]
    return Summary(
        step=step,
        rows=len(side),
        groups=groups,
        mean={name: (_mean(old[rows]), _mean(new[rows])) for name, rows in selections.items()},
        unknown=(int(old.isnan().sum()), int(new.isnan().sum())),
        identical=_same_bits(old, new),
        correlation=_correlation(old[scored_both], new[scored_both]),
        advantage_correlation=_correlation(before[both], after[both]),
        sign_flips=_mean((before[both] * after[both] < 0).double()),
        no_signal=((groups - moving[0]) / groups, (groups - moving[1]) / groups),
        parts={name: _mean(torch.cat([one.parts[name] for one in scored])) for name in names},
    )


def largest_changes(scored: Iterable[ScoredStep], limit: int) -> list[Change]:
    """The `limit` rows of all steps whose advantage changes most; rows that are unknown in either are left out."""
    changes = [change for one in scored for change in one.changes]
    return sorted(changes, key=lambda change: -abs(change.advantage[1] - change.advantage[0]))[:limit]


def _distinct(values: Tensor) -> int:
    return len(set(values.tolist()))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()].double()
    return float(known.mean()) if len(known) else None


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None for fewer than two rows or where one does not vary."""
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])
