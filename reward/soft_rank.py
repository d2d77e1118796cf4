# SPDX-License-Identifier: Apache-2.0
"""Smooth places without ties: 0.05 format + the share of the negatives that the own pair leaves behind.

    reward.custom_reward_function.path=reward/soft_rank.py
    reward.custom_reward_function.reward_kwargs='{temperature: 0.02}'

Keys of reward_kwargs: alpha, temperature (of the sigmoids, at least 0.005).
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.soft_rank
"""

from embedrl_verl.rewards.functions.soft_rank import compute_score

__all__ = ["compute_score"]
