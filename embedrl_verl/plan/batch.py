# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one step: pairs, prompts, rollouts and devices."""

from __future__ import annotations

from dataclasses import dataclass

from embedrl_verl.errors import ConfigError

SIDES = 2


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one step. Prompts count both sides of a pair; rows are rollouts.

    Raises:
        ConfigError: a number does not divide what it must divide; the message names the keys.
    """

    prompts: int
    rollouts: int
    mini_prompts: int
    devices: int
    model_parallel: int
    rollout_parallel: int

    def __post_init__(self) -> None:
        rules = (
            (
                self.prompts > 0 and self.prompts % SIDES == 0,
                f"data.train_batch_size counts prompts, two for each pair, so it must be even; got {self.prompts}",
            ),
            (
                self.mini_prompts > 0 and self.prompts % self.mini_prompts == 0,
                f"data.train_batch_size ({self.prompts}) must be divisible by "
                f"actor_rollout_ref.actor.ppo_mini_batch_size ({self.mini_prompts}); both count prompts",
            ),
            (
                self.devices % self.model_parallel == 0,
                f"{self.devices} devices (trainer.nnodes x trainer.n_gpus_per_node) must be divisible by the actor's "
                f"model-parallel size ({self.model_parallel})",
            ),
            (
                self.devices % self.rollout_parallel == 0,
                f"{self.devices} devices (trainer.nnodes x trainer.n_gpus_per_node) must be divisible by the size of "
                f"one rollout replica ({self.rollout_parallel}: tensor x data x pipeline parallel size)",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)
        if self.mini_rows % self.data_parallel:
            raise ConfigError(
                f"one update has ppo_mini_batch_size x rollout.n = {self.mini_prompts} x {self.rollouts} = "
                f"{self.mini_rows} rows, which must be divisible by the {self.data_parallel} data-parallel ranks; "
                "change data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size, or the number of devices"
            )

    @property
    def pairs(self) -> int:
        """P: pairs a step."""
        return self.prompts // SIDES

    @property
    def rows(self) -> int:
        """Rollouts a step, both sides."""
        return self.prompts * self.rollouts

    @property
    def mini_rows(self) -> int:
        """Rollouts of one update."""
        return self.mini_prompts * self.rollouts

    @property
    def updates(self) -> int:
        """Actor updates a step."""
        return self.prompts // self.mini_prompts

    @property
    def data_parallel(self) -> int:
        """Ranks that share the rows of an update."""
        return self.devices // self.model_parallel
