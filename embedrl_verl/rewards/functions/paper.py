# SPDX-License-Identifier: Apache-2.0
"""R = alpha F + beta J + gamma O with alpha 0.05, beta 0.8, gamma 0.2 (paper eq. 5, supplement B.2)."""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.presets import PAPER, reward_parts, row_scores


def compute_score(batch: RewardBatch, **reward_kwargs: object) -> Mapping[str, Tensor]:
    """Format, the judge's pick, and accuracy times margin.

    Args:
        reward_kwargs: fields of `RewardConfig` (alpha, beta, gamma, accuracy, temperature) over `PAPER`.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "process" (only with beta > 0), "accuracy", "margin",
        "outcome".

    Raises:
        ConfigError: beta > 0 without a judge, or bad `reward_kwargs`.
    """
    config = PAPER.override(reward_kwargs)
    parts = reward_parts(batch, config)
    score = row_scores(batch, config, parts["format"], parts.get("process"), parts["outcome"])
    return {"score": score, **parts}
