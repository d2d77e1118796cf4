# SPDX-License-Identifier: Apache-2.0
"""R = g(with T-CoT) - g(raw input): does thinking help? Pays only what the T-CoT adds to the input's own rank.

g is the reciprocal rank of the own pair among the other pairs (`measure="reciprocal"`), or the fraction of them that it
leaves behind, smoothly ("soft"); mean over the pair's positives, or the "best" one. A pair counts once, whatever it has
of columns: those of a pair tie in the raw similarity, and each is worth its share of the pair with T-CoTs. Both ranks
are among the same candidates: those with both embeddings. Ties count against the row.

GRPO compares the rollouts of one prompt, which share their raw rank: with `loss_weight` 1 it learns from g(with T-CoT)
alone, and the gain is there to be read. Another weight makes the raw rank matter; 0 pays improvements only.

    embedrl.reward.raw_embeddings=True
    reward.custom_reward_function.path=reward/gain.py
    '+reward.custom_reward_function.reward_kwargs={measure: soft, loss_weight: 0.5}'
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedrl_verl.rewards import Positives, RewardBatch, check_number, row_scores


def compute_score(
    batch: RewardBatch,
    *,
    measure: Literal["reciprocal", "soft"] = "reciprocal",
    positives: Positives = "mean",
    temperature: float = 0.05,
    loss_weight: float = 1.0,
    alpha: float = 0.0,
) -> Mapping[str, Tensor]:
    """The gain over the raw input, and nothing else unless `alpha` adds the format.

    Args:
        temperature: of "soft", in cosines, at least 0.005.
        loss_weight: a row that falls behind its raw input gets so much of its loss.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "rank", "raw_rank" (among pairs, from 1), "gain", "helped"
        and "hurt" (0 or 1). The gain is unknown without either embedding, without a positive and without a negative;
        with `alpha`, the format of a row with T-CoT embedding is left.
    """
    if measure not in ("reciprocal", "soft"):
        raise ValueError(f"measure must be reciprocal or soft; got {measure!r}")
    check_number("loss_weight", loss_weight)
    check_number("temperature", temperature, 0.005)
    both, tau = batch.valid & batch.raw_valid(), None if measure == "reciprocal" else temperature
    thought, raw = (
        batch.ranks(raw=raw, among=both, temperature=tau, by_pair=True, positives=positives) for raw in (False, True)
    )
    gain = thought.reciprocal - raw.reciprocal if tau is None else thought.outranked - raw.outranked
    paid = torch.where(gain < 0, loss_weight * gain, gain)
    helped, hurt = ((gain * sign > 0).float().masked_fill(gain.isnan(), torch.nan) for sign in (1, -1))
    form = batch.format()
    parts = {"format": form, "rank": thought.rank, "raw_rank": raw.rank, "gain": gain}
    return {
        "score": row_scores(batch, form, None, paid, alpha=alpha, beta=0.0, gamma=1.0),
        **parts,
        "helped": helped,
        "hurt": hurt,
    }
