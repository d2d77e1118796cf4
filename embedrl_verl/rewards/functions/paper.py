# SPDX-License-Identifier: Apache-2.0
"""R = 0.05 F + 0.8 J + 0.2 A M: format, the judge's pick, and accuracy times margin (paper eq. 5, supplement B.2).

    reward.custom_reward_function.path=reward/paper.py
    '+reward.custom_reward_function.reward_kwargs={accuracy: all}'

Needs a judge (embedrl.judge).
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards import Accuracy, RewardBatch, row_scores


def compute_score(
    batch: RewardBatch,
    *,
    alpha: float = 0.05,
    beta: float = 0.8,
    gamma: float = 0.2,
    accuracy: Accuracy = "share",
    temperature: float = 0.5,
) -> Mapping[str, Tensor]:
    """Format, process and outcome.

    Args:
        alpha, beta, gamma: their weights; with beta 0 the judge is not asked.
        accuracy, temperature: as in `no_judge`.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "accuracy", "margin", "outcome" and, with beta > 0,
        "process" (1 where the judge picked the own pair from the list, else 0).
    """
    acc, margin, outcome = batch.retrieval(temperature=temperature, accuracy=accuracy).reward  # A, M, O = A M (eq. 3)
    process = batch.process() if beta > 0 else None  # J (eq. 4)
    form = batch.format()
    score = row_scores(batch, form, process, outcome, alpha=alpha, beta=beta, gamma=gamma)
    parts = {"score": score, "format": form, "accuracy": acc, "margin": margin, "outcome": outcome}
    return parts if process is None else {**parts, "process": process}
