# SPDX-License-Identifier: Apache-2.0
"""R = 0.05 F + 0.8 A M: format, and accuracy times margin. The default: the paper's reward where no judge runs.

reward.custom_reward_function.path=reward/no_judge.py
'+reward.custom_reward_function.reward_kwargs={gamma: 1.0, temperature: 0.2}'
"""

from collections.abc import Mapping

from torch import Tensor

from embedrl_verl.rewards import Accuracy, RewardBatch, row_scores


def compute_score(
    batch: RewardBatch,
    *,
    alpha: float = 0.05,
    beta: float = 0.0,
    gamma: float = 0.8,
    accuracy: Accuracy = "share",
    temperature: float = 0.5,
) -> Mapping[str, Tensor]:
    """Format and outcome (method section 4).

    Args:
        alpha, gamma: weights of the two. beta: of the judge's pick, as in `paper`.
        accuracy: "share" = the fraction of the row's top G that are its positives; "all" = 1 if all are, else 0.
        temperature: tau of the softmax over the negatives, in cosines.

    Returns:
        (N,) float32 each, NaN = unknown: "score", "format", "accuracy", "margin", "outcome" and, with beta > 0,
        "process".
    """
    acc, margin, outcome = batch.retrieval(temperature=temperature, accuracy=accuracy).reward  # A, M, O = A M (eq. 3)
    process = batch.process() if beta > 0 else None  # J (eq. 4)
    form = batch.format()
    score = row_scores(batch, form, process, outcome, alpha=alpha, beta=beta, gamma=gamma)
    parts = {"score": score, "format": form, "accuracy": acc, "margin": margin, "outcome": outcome}
    return parts if process is None else {**parts, "process": process}
