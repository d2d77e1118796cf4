# SPDX-License-Identifier: Apache-2.0
"""Trainer modes `egrl_colocate_async` and `egrl_separate_async`: EG-RL over verl's asynchronous trainers.

Rollouts of later batches run while a batch is trained on: on the same devices, interrupted by every update
(`colocate`), or on devices of their own (`separate`). The stages are those of `egrl_sync`. What is added:

1. prompts are fetched, tagged, sampled, dropped and replaced as whole groups (`replay_buffer`);
2. with `trainer.v1.separate_async.parameter_sync_step` = k, a step has k mini-batches, each a batch of its own for the
   reward, the source rule and co-training;
3. a request that an update interrupts goes on with a new seed (`agent_loop.ResumingClient`);
4. rollouts wait while validation has the devices to itself;
5. a resumed run goes on with the groups that were in flight, and nothing is left of those that had been trained on;
6. `embedrl/off_policy_age/*`: steps from a prompt's submission to the step that trains on it. The lag of the weights
   that wrote a row is verl's own metric, `training/off_policy/trajectory_staleness/*`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import (
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    register_trainer,
    trainer_separate_async,
)

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.platforms import plugin
from embedrl_verl.trainer.agent_loop import ResumingClient
from embedrl_verl.trainer.egrl import EGRLMixin
from embedrl_verl.trainer.replay_buffer import PromptTag, complete_groups, tag_prompts
from embedrl_verl.trainer.reward_stage import EMBED_PARTITION, ScoredRows


class _PausesRollouts:
    """verl's checkpoint manager during validation. verl puts the servers to sleep for the reward stage, which is right
    when they are idle; here training's rollouts may be running on them, and have to be stopped before and go on after.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def sleep_replicas(self) -> None:
        """Interrupt what runs, then sleep."""
        if self._manager.replicas:
            self._manager.abort_replicas()
            self._manager.sleep_replicas()

    def update_weights(self) -> None:
        """Wake up with the current weights, then go on."""
        if self._manager.replicas:
            self._manager.update_weights()
            self._manager.resume_generation_replicas()


def off_policy_age(tags: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Steps from submission to training of a batch's rows: mean, largest and smallest.

    Args:
        tags: of the rows in the queue; `global_steps` is the step in which the prompt was submitted.
        step: in which they are trained on.
    """
    ages = [step - int(tag["global_steps"]) for tag in tags]
    figures = {"mean": sum(ages) / len(ages), "max": float(max(ages)), "min": float(min(ages))}
    return {f"embedrl/off_policy_age/{name}": value for name, value in figures.items()}


def clear_leftovers() -> int:
    """Drop what a restored queue holds of no use: rows of the batch that the checkpoint was made after, groups that are
    not whole, and Embedder inputs of prompts that will be generated anew.

    Returns:
        Training prompts that are left, finished or to be generated anew; always whole groups.
    """
    listed = tq.kv_list() or {}
    train = listed.get("train", {})
    prompts = {uid: PromptTag.of(uid, tag) for uid, tag in train.items() if tag.get("is_prompt")}
    steps = {uid: int(train[uid]["global_steps"]) for uid in prompts}
    kept = {uid for group in complete_groups(prompts, prompts, steps) for uid in group.uids}
    ended = {uid for uid in kept if train[uid]["status"] in ("finished", "failure")}
    for partition, wanted in (("train", kept), (EMBED_PARTITION, ended)):
        keys = [key for key in listed.get(partition, {}) if key.split("_")[0] not in wanted]
        if keys:
            tq.kv_clear(keys=keys, partition_id=partition)
    return len(kept)


class EGRLAsyncMixin(EGRLMixin):
    """What the asynchronous modes add to EG-RL's stages; see the module docstring."""

    checkpoint_manager: Any
    llm_server_manager: Any
    _restored_tq_prompt_count: int

    # ------------------------------------------------------------------ prompts go in

    @property
    def prompts_a_fetch(self) -> int:
        """A group: what verl fetches, refills and warms up with is a multiple of it, so that nothing splits a pair."""
        return 2 * MediaConfig.from_config(self.config.data).pairs_together

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self.config.data.gen_batch_size = self.prompts_a_fetch  # verl has set it to 1

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """As verl's, rounded up to whole groups: the number of prompts that verl waits for before it takes back lent
        devices need not be one."""
        size = self.prompts_a_fetch
        return int(super()._add_prompts_to_generate(-(-num_prompts // size) * size))  # type: ignore[misc]

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        """As verl's, with the tags that say which prompts belong together."""
        uids, pairs, sides, sources = (
            list(batch[name]) for name in ("uid", "embedrl_pair_id", "embedrl_side", "data_source")
        )
        tags = tag_prompts(uids, pairs, sides, sources, self.prompts_a_fetch)
        tq.kv_batch_put(keys=uids, partition_id="train", tags=[tag.as_tags() for tag in tags])
        return int(super()._submit_batch_to_rollout(batch))  # type: ignore[misc]

    def get_llm_client(self) -> ResumingClient:
        """The client of the servers that serve rollouts: standalone ones where there are any."""
        manager = getattr(self, "standalone_server_manager", self.llm_server_manager)
        return manager.get_client(client_cls=ResumingClient)

    # ------------------------------------------------------------------ batches come out

    def _compute_reward_colocate(self, batch: KVBatchMeta, metrics: dict[str, float] | None = None) -> KVBatchMeta:
        if metrics is not None:
            metrics.update(off_policy_age(batch.tags, self.global_steps))
        return super()._compute_reward_colocate(batch, metrics)

    def _record(self, scored: ScoredRows, training: bool) -> None:
        super()._record(scored, training)
        for row in scored.rows if training else ():
            if row.key in self._dump_parts:
                self._dump_parts[row.key]["mini_batch"] = self.local_trigger_step

    def step(self, metrics: dict[str, float], timing_raw: dict[str, float]) -> KVBatchMeta:
        """As verl's. It averages or adds up what the mini-batches of a step report; counters are their last value."""
        batch = super().step(metrics, timing_raw)  # type: ignore[misc]
        metrics["embedrl/total_steps"] = float(self.total_training_steps)
        training = self.embedder_training
        if training is not None and "embedder/updates" in metrics:
            metrics["embedder/updates"] = float(training.state.updates)
        return batch

    def _validate(self) -> dict[str, float]:
        manager = self.checkpoint_manager
        self.checkpoint_manager = _PausesRollouts(manager)
        try:
            return super()._validate()
        finally:
            self.checkpoint_manager = manager

    # ------------------------------------------------------------------ resume

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()  # type: ignore[misc]
        if self.global_steps:
            restored, self._restored_tq_prompt_count = self._restored_tq_prompt_count, clear_leftovers()
            print(f"EG-RL: {self._restored_tq_prompt_count} of {restored} prompts in flight go on", flush=True)


@register_trainer("egrl_colocate_async")
class EGRLTrainerColocateAsync(EGRLAsyncMixin, PPOTrainerColocateAsync):  # type: ignore[misc]
    """EG-RL, asynchronous on the same devices: rollouts are interrupted while a batch is trained on."""

    parent_mode = "colocate_async"


@register_trainer("egrl_separate_async")
class EGRLTrainerSeparateAsync(EGRLAsyncMixin, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """EG-RL, asynchronous on two sets of devices: rollouts never stop but for the weights of every
    `parameter_sync_step` updates."""

    parent_mode = "separate_async"

    def _setup(self) -> None:
        # Without servers on the training devices (actor_rollout_ref.hybrid_engine=False) verl 0.9.1 logs a line with an
        # argument that logging refuses, unless the line's level is off.
        log = logging.getLogger(trainer_separate_async.__name__)
        level = log.level
        if not self._enable_hybrid_replicas:
            log.setLevel(logging.WARNING)
        try:
            super()._setup()
        finally:
            log.setLevel(level)


plugin.add_trainers(__name__)
