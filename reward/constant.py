# SPDX-License-Identifier: Apache-2.0
"""A constant reward: plain GRPO without a signal, the baseline of benchmarks (timing only).

    reward.custom_reward_function.path=reward/constant.py
    reward.custom_reward_function.reward_kwargs='{value: 0.0}'

Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.constant
"""

from embedrl_verl.rewards.functions.constant import compute_score

__all__ = ["compute_score"]
