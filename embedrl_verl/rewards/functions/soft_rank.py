# SPDX-License-Identifier: Apache-2.0
"""R = 0.05 F + mean over p of (1 - softrank_p / n): smooth places, without ties.

softrank_p = sum over the row's n negatives j of sigmoid((S_ij - S_ip) / temperature), over the positives p of row i:
how many negatives are ahead of p, those close to it counting in part. `outcome` gives every row below the top the
accuracy 0; here each negative that falls behind is worth the same.

    reward.custom_reward_function.path=reward/soft_rank.py
    '+reward.custom_reward_function.reward_kwargs={temperature: 0.02}'
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards import RewardBatch, check_number, row_scores


def compute_score(batch: RewardBatch, *, alpha: float = 0.05, temperature: float = 0.05) -> Mapping[str, Tensor]:
    """Format, and the fraction of the negatives that the own pair leaves behind.

    Args:
        temperature: in cosines, at least 0.005; the smaller, the closer to hard ranks.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "soft_rank" (the fraction, in [0, 1]) and "rank" (mean of
        1 + softrank). Without a valid positive or any negative both ranks are unknown, and the format is left.
    """
    check_number("temperature", temperature, 0.005)
    ranks = batch.ranks(temperature=temperature)
    form = batch.format()
    score = row_scores(batch, form, None, ranks.outranked, alpha=alpha, beta=0.0, gamma=1.0)
    return {"score": score, "format": form, "soft_rank": ranks.outranked, "rank": ranks.rank}
