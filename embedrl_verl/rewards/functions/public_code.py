# SPDX-License-Identifier: Apache-2.0
"""R = 0.05 F + 0.2 J max(M, 0) + 0.8 (A M / 2): the published code's weights, which used G = 4 rollouts a side.

There the judge's pick was worth the margin, so that a negative margin made a right pick a penalty: here it is worth at
least 0.

    reward.custom_reward_function.path=reward/public_code.py

Needs a judge (embedrl.judge).
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards import Accuracy, RewardBatch, row_scores


def compute_score(
    batch: RewardBatch,
    *,
    alpha: float = 0.05,
    beta: float = 0.2,
    gamma: float = 0.8,
    accuracy: Accuracy = "share",
    temperature: float = 0.5,
) -> Mapping[str, Tensor]:
    """Arguments and result as in `paper`; "process" is the bare pick (0 or 1)."""
    acc, margin, outcome = batch.retrieval(temperature=temperature, accuracy=accuracy).reward  # A, M, O = A M (eq. 3)
    process = batch.process() if beta > 0 else None  # J (eq. 4)
    paid = None if process is None else process * margin.clamp(min=0)
    form = batch.format()
    score = row_scores(batch, form, paid, outcome / 2, alpha=alpha, beta=beta, gamma=gamma)
    parts = {"score": score, "format": form, "accuracy": acc, "margin": margin, "outcome": outcome}
    return parts if process is None else {**parts, "process": process}
