# SPDX-License-Identifier: Apache-2.0
"""Does thinking help? The reciprocal rank with T-CoT minus that of the raw input, among the same pairs.

    embedrl.reward.raw_embeddings=True
    reward.custom_reward_function.path=reward/gain.py
    reward.custom_reward_function.reward_kwargs='{measure: soft, loss_weight: 0.5}'

Keys of reward_kwargs: measure (reciprocal | soft), positives (mean | best), temperature (of soft), loss_weight (0: only
improvements are paid), alpha (of the format; 0).
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.gain
"""

from embedrl_verl.rewards.functions.gain import compute_score

__all__ = ["compute_score"]
