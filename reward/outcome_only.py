# SPDX-License-Identifier: Apache-2.0
"""Retrieval alone: accuracy x margin, no format term and no judge.

    reward.custom_reward_function.path=reward/outcome_only.py
    reward.custom_reward_function.reward_kwargs='{accuracy: all}'

Keys of reward_kwargs: accuracy (share | all), temperature.
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.outcome_only
"""

from embedrl_verl.rewards.functions.outcome_only import compute_score

__all__ = ["compute_score"]
