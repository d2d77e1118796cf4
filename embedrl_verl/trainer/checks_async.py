# SPDX-License-Identifier: Apache-2.0
"""What the asynchronous modes need of a run's configuration, as rules for `checks.check_run_config`."""

from __future__ import annotations

from typing import Any

from embedrl_verl.data.settings import DataSettings

COLOCATE, SEPARATE = "egrl_colocate_async", "egrl_separate_async"

Rule = tuple[bool, str]


def mini_batches(config: Any) -> int:
    """Batches that a step samples and rewards one after the other: 1, or verl's parameter_sync_step."""
    v1 = config.trainer.v1
    return max(1, int(v1.separate_async.parameter_sync_step)) if v1.trainer_mode == SEPARATE else 1


def replica_size(rollout: Any) -> int:
    """Devices of one rollout server."""
    return int(rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size)


def async_rules(config: Any) -> list[Rule]:
    """(holds, message) for each rule; none but the first for the synchronous modes."""
    mode = config.trainer.v1.trainer_mode
    hybrid = bool(config.actor_rollout_ref.get("hybrid_engine", True))
    rules = [(hybrid or mode == SEPARATE, f"actor_rollout_ref.hybrid_engine must be True with trainer mode {mode}")]
    if mode not in (COLOCATE, SEPARATE):
        return rules
    sampler = config.trainer.v1.sampler
    threshold, strategy = sampler.max_off_policy_threshold, sampler.max_off_policy_strategy
    section = config.trainer.v1.separate_async if mode == SEPARATE else config.trainer.v1.colocate_async
    rules += [
        (
            threshold is None or (isinstance(threshold, int) and threshold >= 1),
            f"trainer.v1.sampler.max_off_policy_threshold must be 1 or more, or null for no limit; got {threshold}",
        ),
        (
            strategy in ("drop", "wait"),
            f"trainer.v1.sampler.max_off_policy_strategy must be drop or wait; got {strategy}",
        ),
        (
            section.num_warmup_batches >= 0,
            f"trainer.v1.{mode.removeprefix('egrl_')}.num_warmup_batches must be 0 or more; "
            f"got {section.num_warmup_batches}",
        ),
        (
            not config.skip.rollout_tq.enable,
            "skip.rollout_tq.enable must be False: rollouts from a file are not asynchronous, and name no pairs",
        ),
    ]
    return rules + _separate_rules(config) if mode == SEPARATE else rules


def _separate_rules(config: Any) -> list[Rule]:
    rollout, model = config.actor_rollout_ref.rollout, config.reward.reward_model
    prompts, steps = int(config.data.train_batch_size), mini_batches(config)
    mini = int(config.actor_rollout_ref.actor.ppo_mini_batch_size)
    group = 2 * DataSettings.from_config(config.data).pairs_together
    devices = int(rollout.nnodes) * int(rollout.n_gpus_per_node)
    replica = replica_size(rollout)
    return [
        (
            config.trainer.v1.separate_async.parameter_sync_step >= 1,
            "trainer.v1.separate_async.parameter_sync_step must be 1 or more; "
            f"got {config.trainer.v1.separate_async.parameter_sync_step}",
        ),
        (
            prompts == steps * mini,
            f"data.train_batch_size ({prompts}) must be trainer.v1.separate_async.parameter_sync_step ({steps}) x "
            f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini}), in prompts: each mini-batch is rewarded by itself",
        ),
        (
            mini % group == 0,
            f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini} prompts) must be a multiple of the {group} prompts "
            f"that stay together (2 sides x data.embedrl.pairs_together={group // 2})",
        ),
        (
            devices >= 1 and devices % replica == 0,
            "actor_rollout_ref.rollout.nnodes x .n_gpus_per_node are the devices of the rollout alone; they must be a "
            f"multiple of one replica's {replica}; got {rollout.nnodes} x {rollout.n_gpus_per_node}",
        ),
        (
            rollout.checkpoint_engine.backend != "naive",
            "actor_rollout_ref.rollout.checkpoint_engine.backend must reach other processes: nccl or nixl on GPUs "
            "(gloo with platform=cpu); got naive",
        ),
        (
            not model.enable or model.enable_resource_pool,
            "a judge that verl serves must have devices of its own (reward.reward_model.enable_resource_pool=True): "
            "rollouts never pause to make room for it",
        ),
    ]
