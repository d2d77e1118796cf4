# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffer with a configurable poll interval.

The stock buffer looks at the queue every two seconds, which on a short step is most of the waiting. Chosen by verl's
own key `trainer.v1.sampler.custom_sampler`; everything else is verl's behaviour.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from embedrl_verl.errors import ConfigError


class EGRLReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` that polls every `sampler_kwargs.poll_interval` seconds.

    Raises:
        ConfigError: the trainer is not a synchronous one (the asynchronous buffer differs), or the interval is missing.
    """

    def __init__(self, trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> None:
        if trainer_mode != "sync":
            raise ConfigError(f"EGRLReplayBuffer serves synchronous training only; got trainer mode {trainer_mode!r}")
        if "poll_interval" not in sampler_kwargs:
            raise ConfigError("trainer.v1.sampler.sampler_kwargs.poll_interval (seconds) is missing")
        interval = float(sampler_kwargs["poll_interval"])
        super().__init__(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, poll_interval=interval, **kwargs)
