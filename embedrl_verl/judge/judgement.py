# SPDX-License-Identifier: Apache-2.0
"""What a judge said of a step's rows, and the numbers of it for the log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from embedrl_verl.judge.candidates import JudgeList
from embedrl_verl.rewards import SIDES

# Positions of which the log shows the bias.
_POSITIONS = 12


@dataclass(frozen=True, eq=False, repr=False)  # asyncio.run prints a result for itself
class Judgement:
    """Result of `ListwiseJudge.judge` for N rows.

    scores: (N,) float32, J of eq. 4: 1 the judge picked a candidate of the own pair, 0 another one, NaN unknown.
    picks: (N,) int64, number of the candidate picked, counted from 1; 0 = none.
    side: (N,) int64, 0 = query, 1 = target.
    own_positions: for every row the numbers of its list that are of its own pair; () without a list.
    lists: the lists.
    causes: how many rows with a list are unknown for which cause.
    requests, retries: requests sent, and tries beyond the first of each.
    seconds: of the whole stage.
    """

    scores: Tensor
    picks: Tensor
    side: Tensor
    own_positions: tuple[tuple[int, ...], ...]
    lists: tuple[JudgeList, ...]
    causes: Counter[str]
    requests: int
    retries: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, each with the prefix `judge/`; a mean over no row is left out.

        `hit_rate/mean`, `/query`, `/target` and `blind_rate/...`, what a judge that cannot read would hit on the same
        lists (the own pair's share of each), both over the rows that were judged; `hit_above_blind`, the difference of
        their means. `unknown_rate` of the rows with a list, `unknown/<cause>` their counts, `rows_without_list`. By
        position p, up to the 12th: `picked_at/<p>` share of picks, `own_at/<p>` share of lists in which the own pair
        stands there, both over judged rows whose list is that long, and `hit_at/<p>` hit rate of the picks there. A
        judge without position bias picks where own candidates are. `requests`, `retries`, `seconds`,
        `requests_per_second`.
        """
        length = torch.zeros(len(self.scores), dtype=torch.int64)
        blind = torch.full((len(self.scores),), torch.nan, dtype=torch.float64)
        own = torch.zeros(len(self.scores), _POSITIONS + 1, dtype=torch.bool)  # of position 0 nothing is said
        for listed in self.lists:
            rows = torch.tensor(listed.rows)
            length[rows], blind[rows] = len(listed), listed.own_share
            shown = torch.tensor(listed.own[:_POSITIONS])
            own[rows, 1 : len(shown) + 1] = shown
        known, with_list = ~self.scores.isnan(), length > 0
        result = {"rows_without_list": float((~with_list).sum())}
        for name, side in (("mean", None), *((name, number) for number, name in enumerate(SIDES))):
            rows = known if side is None else known & (self.side == side)
            if rows.any():
                result[f"hit_rate/{name}"] = float(self.scores[rows].double().mean())
                result[f"blind_rate/{name}"] = float(blind[rows].mean())
        if known.any():
            result["hit_above_blind"] = result["hit_rate/mean"] - result["blind_rate/mean"]
        if with_list.any():
            result["unknown_rate"] = float((with_list & ~known).sum() / with_list.sum())
        for place in range(1, _POSITIONS + 1):
            rows = known & (length >= place)
            if not rows.any():
                break
            picked = rows & (self.picks == place)
            result[f"picked_at/{place}"] = float(picked.sum() / rows.sum())
            result[f"own_at/{place}"] = float(own[rows, place].double().mean())
            if picked.any():
                result[f"hit_at/{place}"] = float(self.scores[picked].double().mean())
        result |= {f"unknown/{cause.replace(' ', '_')}": float(count) for cause, count in self.causes.items()}
        result |= {"requests": float(self.requests), "retries": float(self.retries), "seconds": self.seconds}
        result["requests_per_second"] = self.requests / self.seconds
        return {f"judge/{name}": value for name, value in result.items()}
