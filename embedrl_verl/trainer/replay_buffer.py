# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffers for batches of pairs. Chosen by verl's own key `trainer.v1.sampler.custom_sampler`.

The synchronous one differs from verl's in its poll interval only: the stock buffer looks at the queue every two
seconds, which on a short step is most of the waiting. The asynchronous one puts batches together from whole groups of
prompts (`pair_groups`) of one data source. Which prompts are too stale, and what happens to them, is verl's own policy
(`trainer.v1.sampler.max_off_policy_threshold` and `.max_off_policy_strategy`); here it is applied to whole groups.
"""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.trainer.pair_groups import Group, PromptTag, batch_of_each_source, choose_batch, complete_groups
from embedrl_verl.trainer.rows import EMBED_PARTITION

VALIDATION = "val"


def replay_buffer(trainer_mode: str, **kwargs: Any) -> ReplayBuffer:
    """The buffer of a trainer mode, with the arguments that verl gives a custom sampler."""
    cls = EGRLReplayBuffer if trainer_mode == "sync" else PairReplayBuffer
    return cls(trainer_mode=trainer_mode, **kwargs)


def _poll_interval(sampler_kwargs: Any) -> float:
    if "poll_interval" not in sampler_kwargs:
        raise ConfigError("trainer.v1.sampler.sampler_kwargs.poll_interval (seconds) is missing")
    return float(sampler_kwargs["poll_interval"])


class EGRLReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` that polls every `sampler_kwargs.poll_interval` seconds.

    Raises:
        ConfigError: the trainer is not a synchronous one (see PairReplayBuffer), or the interval is missing.
    """

    def __init__(self, trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> None:
        if trainer_mode != "sync":
            raise ConfigError(f"EGRLReplayBuffer serves synchronous training only; got trainer mode {trainer_mode!r}")
        interval = _poll_interval(sampler_kwargs)
        super().__init__(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, poll_interval=interval, **kwargs)


class PairReplayBuffer(ReplayBufferAsync):
    """`ReplayBufferAsync` whose batches hold whole groups of one data source, the oldest first.

    A group is sampled, dropped as stale or replaced after a failure as a whole, and only when none of its prompts is
    still running: so nothing can write rows of a group that is gone. When no source can fill a batch and nothing is in
    flight that could, more prompts are asked for; with S sources and batches of N groups that ends at the latest with
    S (N - 1) + 1 groups in the queue.

    Raises:
        ConfigError: the poll interval is missing.
        EmbedderError: (while sampling) as many prompts as a batch holds have failed since the last batch.
    """

    def __init__(self, trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> None:
        interval = _poll_interval(sampler_kwargs)
        super().__init__(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, poll_interval=interval, **kwargs)
        self._tags: dict[str, PromptTag] = {}  # of the training prompts in the queue, in the order of submission
        self._sampling = False  # whether a batch is waited for, or only a number of prompts
        self._target = 0
        self._failed = 0

    # ------------------------------------------------------------------ verl's interface

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """A batch of `batch_size` prompts, as verl's; in training, of whole groups of one source."""
        self._sampling = partition_id != VALIDATION
        try:
            batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        finally:
            self._sampling = False
        self._failed = 0
        return batch, metrics

    def wait_for_sampleable(
        self, global_steps: int, partition_id: str, target_count: int
    ) -> tuple[set[str], dict[str, Any]]:
        """As verl's; remembers how many prompts are waited for."""
        self._target = target_count
        return super().wait_for_sampleable(global_steps, partition_id, target_count)

    # ------------------------------------------------------------------ verl's steps, for groups

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        present = self.prompt_global_steps["train"].keys()
        if present - self._tags.keys():
            # A prompt's tag never changes, so a second look at the queue cannot contradict verl's.
            listed = (tq.kv_list("train") or {}).get("train", {})
            new = {uid: PromptTag.of(uid, listed[uid]) for uid in listed if uid in present and uid not in self._tags}
            self._tags.update(new)
        self._tags = {uid: tag for uid, tag in self._tags.items() if uid in present}

    def _groups(self, uids: set[str]) -> list[Group]:
        return complete_groups(self._tags, uids, self.prompt_global_steps["train"])

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> tuple[Any, Any, Any, Any]:
        *reasons, counts = super()._terminal_eviction_reasons(global_steps, partition_id)
        if partition_id == VALIDATION:
            return (*reasons, counts)
        ended = self._groups(self.finished_keys[partition_id] | self.failure_keys[partition_id])
        stale, filtered, failed = (
            {uid for group in ended if not uids.isdisjoint(group.uids) for uid in group.uids} for uids in reasons
        )
        return stale, filtered, failed, counts

    def _evict_terminal_groups(
        self, global_steps: int, partition_id: str, eviction_reasons: tuple[Any, Any, Any, Any]
    ) -> tuple[set[str], int, int, dict[str, Any]]:
        self._failed += len(eviction_reasons[2] & self.failure_keys[partition_id])
        if self._failed > max(self._target, 1):
            raise EmbedderError(
                f"{self._failed} prompts have failed since the last batch, more than the {self._target} that it "
                "holds, so replacing them leads nowhere. The agent loop workers' log in Ray's session folder says why"
            )
        return super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)
        keys = [key for key in self.partitions[EMBED_PARTITION] if key.split("_")[0] in uids]
        if keys:
            tq.kv_clear(keys=keys, partition_id=EMBED_PARTITION)

    def _sampleable_terminal_keys(self, partition_id: str, eviction_reasons: tuple[Any, Any, Any, Any]) -> set[str]:
        keys: set[str] = super()._sampleable_terminal_keys(partition_id, eviction_reasons)
        if partition_id == VALIDATION:
            return keys
        return {uid for group in self._groups(keys) for uid in group.uids}

    def _has_enough_samples(
        self, global_steps: int, partition_id: str, batch_size: int, sampleable_keys: set[str]
    ) -> bool:
        if not super()._has_enough_samples(global_steps, partition_id, batch_size, sampleable_keys):
            return False
        return not self._sampling or choose_batch(self._groups(sampleable_keys), batch_size) is not None

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, Any], dict[str, int]]:
        oldest, partition, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        if partition_id == VALIDATION:
            return oldest, partition, steps
        groups = choose_batch(self._groups(sampleable_keys), batch_size)
        assert groups is not None  # _has_enough_samples has looked at the same snapshot
        return [uid for group in groups for uid in group.uids], partition, steps

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        if partition_id != VALIDATION and not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
            self.refill_fn(self._missing(partition_id))
        return super()._wait_for_next_poll(partition_id, last_debug_time)

    def _missing(self, partition_id: str) -> int:
        """Prompts that the nearest source lacks for a batch, or all sources together for the number waited for."""
        groups = self._groups(self.finished_keys[partition_id])
        found = sum(len(group.uids) for group in groups)
        if self._sampling:
            batches = batch_of_each_source(groups, self._target).values()
            found = max((sum(len(group.uids) for group in batch) for batch in batches), default=0)
        return self._target - found
