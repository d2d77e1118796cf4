# SPDX-License-Identifier: Apache-2.0
"""R = alpha F + gamma O with alpha 0.05, gamma 0.8: the paper's reward where no judge runs (method section 4)."""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.total import NO_JUDGE, reward_terms, row_scores


def compute_score(batch: RewardBatch, **reward_kwargs: object) -> Mapping[str, Tensor]:
    """Format, and accuracy times margin; arguments and result as in `functions.paper`, over `NO_JUDGE`."""
    config = NO_JUDGE.override(reward_kwargs)
    terms = reward_terms(batch, config)
    return {"score": row_scores(batch, config, terms), **terms}
