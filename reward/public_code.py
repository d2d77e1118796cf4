# SPDX-License-Identifier: Apache-2.0
"""The weights of the published code: 0.05 format + 0.2 judge's pick x margin + 0.8 (accuracy x margin) / 2.

    reward.custom_reward_function.path=reward/public_code.py

Needs a judge. Keys of reward_kwargs: alpha, beta, gamma, accuracy (share | all), temperature.
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.public_code
"""

from embedrl_verl.rewards.functions.public_code import compute_score

__all__ = ["compute_score"]
