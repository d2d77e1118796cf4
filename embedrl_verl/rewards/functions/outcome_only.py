# SPDX-License-Identifier: Apache-2.0
"""R = A M: accuracy times margin alone (method section 4, eq. 3); no format term and no judge."""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.outcome import Accuracy
from embedrl_verl.rewards.presets import RewardConfig, reward_parts, row_scores


def compute_score(
    batch: RewardBatch, *, accuracy: Accuracy = "share", temperature: float = 0.5
) -> Mapping[str, Tensor]:
    """Nothing is paid for form, so that it can be seen what retrieval alone teaches; "format" is logged.

    Args:
        accuracy, temperature: as in `outcome_reward`.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "accuracy", "margin", "outcome". A row without embedding
        or without a partner is unknown.

    Raises:
        ConfigError: bad arguments.
    """
    config = RewardConfig(alpha=0.0, beta=0.0, gamma=1.0, accuracy=accuracy, temperature=temperature)
    parts = reward_parts(batch, config)
    return {"score": row_scores(batch, config, parts["format"], None, parts["outcome"]), **parts}
