# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one step: pairs, prompts, rollouts and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEPARATE = "egrl_separate_async"
SIDES = 2


def is_megatron(config: Any) -> bool:
    """Whether the actor is on verl's Megatron engine."""
    return str(config.actor_rollout_ref.actor.strategy) == "megatron"


def mini_batches(config: Any) -> int:
    """Batches that a step samples and rewards one after the other: 1, or verl's parameter_sync_step."""
    v1 = config.trainer.v1
    return max(1, int(v1.separate_async.parameter_sync_step)) if v1.trainer_mode == SEPARATE else 1


def replica_size(rollout: Any) -> int:
    """Devices of one rollout server."""
    return int(rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size)


def ulysses_size(config: Any) -> int:
    """Devices that share a sequence of the actor under FSDP; of verl's two keys the deprecated one wins."""
    actor = config.actor_rollout_ref.actor
    sizes = (one.get("ulysses_sequence_parallel_size") for one in (actor, actor.get("fsdp_config", {})))
    return next((int(size) for size in sizes if size and size > 1), 1)


def longest_row(config: Any) -> int:
    """Tokens of the longest prompt with the longest response."""
    return int(config.data.max_prompt_length) + int(config.data.max_response_length)


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of a step. Prompts count both sides of a pair; rows are rollouts; a "mini" is what one update takes;
    `model_parallel` devices work on the same rows."""

    prompts: int
    rollouts: int
    mini_prompts: int
    devices: int
    model_parallel: int

    @classmethod
    def of(cls, config: Any) -> BatchPlan:
        actor = config.actor_rollout_ref.actor
        if is_megatron(config):
            mesh = actor.megatron
            split = mesh.tensor_model_parallel_size * mesh.pipeline_model_parallel_size * mesh.context_parallel_size
        else:
            split = ulysses_size(config)
        return cls(
            prompts=int(config.data.train_batch_size),
            rollouts=int(config.actor_rollout_ref.rollout.n),
            mini_prompts=int(actor.ppo_mini_batch_size),
            devices=int(config.trainer.nnodes) * int(config.trainer.n_gpus_per_node),
            model_parallel=int(split),
        )

    @property
    def pairs(self) -> int:
        return self.prompts // SIDES

    @property
    def rows(self) -> int:
        return self.prompts * self.rollouts

    @property
    def mini_rows(self) -> int:
        return self.mini_prompts * self.rollouts

    @property
    def updates(self) -> int:
        return self.prompts // self.mini_prompts

    @property
    def data_parallel(self) -> int:
        """Ranks that share the rows of an update."""
        return self.devices // self.model_parallel
