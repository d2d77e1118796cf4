# SPDX-License-Identifier: Apache-2.0
"""R = base + L: any ready-made reward with a fine for long T-CoTs.

With n response tokens, well formed:  L = -penalty * clamp((n - free) / (max - free), 0, 1)
               not well formed (F 0):  L = -penalty, whatever the length

So up to `free` tokens the base counts in full, and from `max` on it is less by `penalty`. Being short is worth
something only to a T-CoT with everything that its input calls for: an empty or broken one never gains by its length.

    reward.custom_reward_function.path=reward/length_shaped.py
    '+reward.custom_reward_function.reward_kwargs={base: soft_rank, free: 200, max: 800, penalty: 0.2}'
"""

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import RewardBatch, check_number

BASES = ("no_judge", "paper", "public_code", "outcome_only", "format_only", "soft_rank", "gain")


def compute_score(
    batch: RewardBatch,
    *,
    base: str = "no_judge",
    free: int = 256,
    max: int = 1024,
    penalty: float = 0.1,
    **base_kwargs: object,
) -> Mapping[str, Tensor]:
    """The base reward and its parts, with the fine.

    Args:
        base: one of `BASES`; `base_kwargs` are its arguments.
        free, max: tokens of the response, 0 <= free < max.
        penalty: the largest fine, in units of the base.

    Returns:
        The base's parts, "score" = base + L, "base" (its score) and "length" (L); (N,) float32, NaN = unknown.
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}; got {base!r}")
    for name, value in (("free", free), ("max", max), ("penalty", penalty)):
        check_number(name, value)
    if free >= max:
        raise ValueError(f"free must be below max; got {free} and {max}")
    if batch.lengths is None:
        raise ConfigError("length_shaped needs the number of response tokens (RewardBatch.lengths); the batch has none")
    parts = dict(import_module(f"embedrl_verl.rewards.functions.{base}").compute_score(batch, **base_kwargs))
    excess = ((batch.lengths - free).double() / (max - free)).clamp_(0.0, 1.0).masked_fill_(batch.format() == 0, 1.0)
    length = (-penalty * excess).to(parts["score"].dtype)
    return {**parts, "base": parts["score"], "length": length, "score": parts["score"] + length}
