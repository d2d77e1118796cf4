# SPDX-License-Identifier: Apache-2.0
"""R = alpha F + beta J + gamma O with alpha 0.05, beta 0.8, gamma 0.2 (paper eq. 5, supplement B.2)."""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.total import PAPER, reward_terms, row_scores


def compute_score(batch: RewardBatch, **reward_kwargs: object) -> Mapping[str, Tensor]:
    """Format, the judge's pick, and accuracy times margin.

    Args:
        reward_kwargs: fields of `RewardConfig` (alpha, beta, gamma, accuracy, temperature) over `PAPER`. beta > 0 needs
            a judge.

    Returns:
        (N,) float32 each, NaN = unknown: "score", and the terms "format", "process" (only with beta > 0), "accuracy",
        "margin", "outcome".
    """
    config = PAPER.override(reward_kwargs)
    terms = reward_terms(batch, config)
    return {"score": row_scores(batch, config, terms), **terms}
