# SPDX-License-Identifier: Apache-2.0
"""Numbers of one step for the log: means of every reward part by side, Hit@1 within the batch, and counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedrl_verl.data.schema import SIDES
from embedrl_verl.rewards.batch import RewardBatch


def batch_metrics(
    batch: RewardBatch, parts: Mapping[str, Tensor], *, evidence: Tensor | None = None
) -> dict[str, float]:
    """Means over the known rows, and counts.

    Args:
        parts: what the reward function returned, (N,) each, NaN = unknown.
        evidence: (N,) crops and key frames that were really cut for each row.

    Returns:
        `embedrl/<part>/query`, `/target` and `/mean` for every part ("score" is called `reward`), for `hit@1` (the best
        positive is above every negative of the batch; ties are misses), `well_formed`, `evidence`, and
        `false_negatives` (columns left out for a row). A mean over no known row is left out. Counts: `embedrl/rows`,
        `embedrl/failed_rows` (no embedding), `embedrl/rows_without_partner` and `embedrl/unknown/<part>`.
    """
    found = batch.hits()
    numbers = {"reward" if name == "score" else name: value for name, value in parts.items()}
    reported = set(numbers)
    numbers["hit@1"] = found.hit
    numbers["well_formed"] = torch.tensor([float(tcot.is_well_formed) for tcot in batch.tcots])
    numbers["false_negatives"] = found.false_negatives.double().masked_fill(~batch.valid, torch.nan)
    if evidence is not None:
        numbers["evidence"] = evidence
    result: dict[str, float] = {}
    for name, value in numbers.items():
        if value.shape != (len(batch),):
            raise ValueError(f"part {name!r} must have shape ({len(batch)},); got {tuple(value.shape)}")
        value = value.double().cpu()
        known = ~value.isnan()
        selections = {side: known & (batch.side == number) for number, side in enumerate(SIDES)} | {"mean": known}
        result |= {f"embedrl/{name}/{key}": float(value[rows].mean()) for key, rows in selections.items() if rows.any()}
        if name in reported:
            result[f"embedrl/unknown/{name}"] = float((~known).sum())
    result["embedrl/rows"] = float(len(batch))
    result["embedrl/failed_rows"] = float((~batch.valid).sum())
    result["embedrl/rows_without_partner"] = float((batch.valid & found.hit.isnan()).sum())
    return result
