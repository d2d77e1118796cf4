# SPDX-License-Identifier: Apache-2.0
"""R = A M: accuracy times margin alone (method section 4, eq. 3); no format term and no judge."""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.retrieval import Accuracy
from embedrl_verl.rewards.total import RewardConfig, reward_terms, row_scores


def compute_score(
    batch: RewardBatch, *, accuracy: Accuracy = "share", temperature: float = 0.5
) -> Mapping[str, Tensor]:
    """What retrieval alone teaches: nothing is paid for form, which is only logged.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "accuracy", "margin", "outcome". A row without embedding
        or without a partner is unknown.
    """
    config = RewardConfig(alpha=0.0, beta=0.0, gamma=1.0, accuracy=accuracy, temperature=temperature)
    terms = reward_terms(batch, config)
    return {"score": row_scores(batch, config, terms), **terms}
