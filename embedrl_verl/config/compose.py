# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run from hydra overrides, and the keys that follow from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedrl_verl.errors import ConfigError


def compose(overrides: Sequence[str], config_name: str = "egrl_trainer") -> Any:
    """The run's configuration (DictConfig) for hydra overrides as on a command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("embedrl_verl.config", version_base=None):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reasons: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            reasons.append(str(cause).strip().partition("\n")[0] or type(cause).__name__)
            cause = cause.__cause__
        raise ConfigError(f"the configuration cannot be composed: {'; '.join(dict.fromkeys(reasons))}") from error


def bound_served_lengths(config: Any) -> None:
    """Set the `max_model_len` of rollout and judge to prompt_length + response_length (tokens), unless it is set.

    verl hands vLLM `max_model_len` alone. Where it is null, verl takes the checkpoint's own limit; vLLM then wants room
    in its cache for one sequence of that length (262,144 tokens for Qwen3-VL, 36 GiB for the 8B model).
    """
    for rollout in (config.actor_rollout_ref.rollout, config.reward.reward_model.rollout):
        if rollout.max_model_len is None:
            rollout.max_model_len = int(rollout.prompt_length) + int(rollout.response_length)
