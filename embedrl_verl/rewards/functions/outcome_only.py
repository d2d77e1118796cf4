# SPDX-License-Identifier: Apache-2.0
"""R = A M: accuracy times margin alone (method section 4, eq. 3); nothing is paid for form.

reward.custom_reward_function.path=reward/outcome_only.py
'+reward.custom_reward_function.reward_kwargs={accuracy: all}'
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards import Accuracy, RewardBatch, row_scores


def compute_score(
    batch: RewardBatch, *, accuracy: Accuracy = "share", temperature: float = 0.5
) -> Mapping[str, Tensor]:
    """What retrieval alone teaches; the format is only logged.

    Args:
        accuracy, temperature: as in `no_judge`.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "accuracy", "margin", "outcome". A row without embedding
        or without a partner is unknown.
    """
    acc, margin, outcome = batch.retrieval(temperature=temperature, accuracy=accuracy).reward
    form = batch.format()
    score = row_scores(batch, form, None, outcome, alpha=0.0, beta=0.0, gamma=1.0)
    return {"score": score, "format": form, "accuracy": acc, "margin": margin, "outcome": outcome}
