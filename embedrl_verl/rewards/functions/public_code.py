# SPDX-License-Identifier: Apache-2.0
"""R = alpha F + beta J max(M, 0) + gamma (A M / 2), alpha 0.05, beta 0.2, gamma 0.8: the published code's weights.

There the judge's pick was worth the margin, so that a negative margin made a right pick a penalty: here it is worth at
least 0. The code used G = 4 rollouts a side.
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.total import PUBLIC_CODE, reward_terms, row_scores


def compute_score(batch: RewardBatch, **reward_kwargs: object) -> Mapping[str, Tensor]:
    """As in `functions.paper`, over `PUBLIC_CODE`; "process" is the bare pick (0 or 1)."""
    config = PUBLIC_CODE.override(reward_kwargs)
    terms = reward_terms(batch, config)
    paid = {"format": terms["format"], "outcome": terms["outcome"] / 2}
    if "process" in terms:
        paid["process"] = terms["process"] * terms["margin"].clamp(min=0)
    return {"score": row_scores(batch, config, paid), **terms}
