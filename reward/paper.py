# SPDX-License-Identifier: Apache-2.0
"""The paper's reward: 0.05 format + 0.8 process (judge) + 0.2 outcome (accuracy x margin).

    reward.custom_reward_function.path=reward/paper.py
    reward.custom_reward_function.reward_kwargs='{accuracy: all}'

Needs a judge. Keys of reward_kwargs: alpha, beta, gamma, accuracy (share | all), temperature.
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.paper
"""

from embedrl_verl.rewards.functions.paper import compute_score

__all__ = ["compute_score"]
