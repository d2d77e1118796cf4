# SPDX-License-Identifier: Apache-2.0
"""The longest sequence that vLLM serves: verl hands it `max_model_len` alone, never prompt_length and response_length.

Where it is null, verl takes the checkpoint's own limit. vLLM then wants room in its cache for one sequence of that
length (262,144 tokens for Qwen3-VL, 36 GiB for the 8B model) and does not start on a GPU that has less left.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

SECTIONS = ("actor_rollout_ref.rollout", "reward.reward_model.rollout")


def bound_served_lengths(config: Any) -> None:
    """Set each section's `max_model_len` to its prompt_length + response_length (tokens), unless it is set."""
    for name in SECTIONS:
        rollout = OmegaConf.select(config, name)
        if rollout.max_model_len is None:
            rollout.max_model_len = int(rollout.prompt_length) + int(rollout.response_length)
