# SPDX-License-Identifier: Apache-2.0
"""Form alone: 1 for a well-formed T-CoT with the evidence that its input calls for, else 0.

    reward.custom_reward_function.path=reward/format_only.py

Without these files (installed package): path=pkg://embedrl_verl.rewards.functions.format_only
"""

from embedrl_verl.rewards.functions.format_only import compute_score

__all__ = ["compute_score"]
