# SPDX-License-Identifier: Apache-2.0
"""The paper's reward without a judge: 0.05 format + 0.8 outcome (accuracy x margin). The default.

    reward.custom_reward_function.path=reward/no_judge.py
    reward.custom_reward_function.reward_kwargs='{gamma: 1.0, temperature: 0.2}'

Keys of reward_kwargs: alpha, beta, gamma, accuracy (share | all), temperature.
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.no_judge
"""

from embedrl_verl.rewards.functions.no_judge import compute_score

__all__ = ["compute_score"]
