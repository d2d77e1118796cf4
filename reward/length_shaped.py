# SPDX-License-Identifier: Apache-2.0
"""Another reward with a fine for long T-CoTs: none up to `free` tokens, `penalty` from `max` on and for broken ones.

    reward.custom_reward_function.path=reward/length_shaped.py
    reward.custom_reward_function.reward_kwargs='{base: soft_rank, free: 200, max: 800, penalty: 0.2}'

Keys of reward_kwargs: base (no_judge | paper | public_code | outcome_only | format_only | soft_rank | gain), free, max,
penalty, and those of the base.
Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.length_shaped
"""

from embedrl_verl.rewards.functions.length_shaped import compute_score

__all__ = ["compute_score"]
