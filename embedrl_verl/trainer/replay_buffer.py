# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffers for batches of pairs. Chosen by verl's own key `trainer.v1.sampler.custom_sampler`.

The synchronous one differs from verl's in its poll interval only: the stock buffer looks at the queue every two
seconds, which on a short step is most of the waiting.

In the asynchronous modes prompts of many steps lie in one queue and finish in any order. So each submitted prompt
carries a tag that names its group: the two sides of a pair, or of the `data.embedrl.pairs_together` neighbouring pairs
that share a batch. A group is trained on as a whole or dropped as a whole. The same pair may be in flight twice (in two
epochs): two groups, which never share a batch, since its rollouts would be each other's negatives. Which prompts are
too stale, and what happens to them, is verl's own policy (`trainer.v1.sampler.max_off_policy_threshold` and
`.max_off_policy_strategy`); here it is applied to whole groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.trainer.reward_stage import EMBED_PARTITION

VALIDATION = "val"
_GROUP, _SIZE = "embedrl_group", "embedrl_group_size"
_PAIR, _SIDE, _SOURCE = "embedrl_pair_id", "embedrl_side", "data_source"

# ---------------------------------------------------------------------- groups of prompts


@dataclass(frozen=True)
class PromptTag:
    """What the queue's tags say of a prompt: its group (the uid of the group's first prompt), the group's size in
    prompts, pair, side and data source.
    """

    group: str
    size: int
    pair_id: str
    side: str
    source: str

    def as_tags(self) -> dict[str, Any]:
        """Tags for TransferQueue, which keeps them when the prompt's status is written."""
        return {_GROUP: self.group, _SIZE: self.size, _PAIR: self.pair_id, _SIDE: self.side, _SOURCE: self.source}

    @classmethod
    def of(cls, uid: str, tags: Mapping[str, Any]) -> PromptTag:
        """The tag of a prompt in the queue."""
        missing = [name for name in (_GROUP, _SIZE, _PAIR, _SIDE, _SOURCE) if name not in tags]
        if missing:
            raise EmbedderError(
                f"prompt {uid} in the rollout queue must name its pair; its tags lack {', '.join(missing)}. Submit "
                "prompts through the trainer's _submit_batch_to_rollout, and resume only from a checkpoint of this mode"
            )
        return cls(tags[_GROUP], int(tags[_SIZE]), str(tags[_PAIR]), str(tags[_SIDE]), str(tags[_SOURCE]))


def tag_prompts(
    uids: Sequence[str], pair_ids: Sequence[str], sides: Sequence[str], sources: Sequence[str], size: int
) -> list[PromptTag]:
    """Tags of prompts in the order of the pair sampler: `size` prompts a group, the sides of a pair side by side."""
    tags = [
        PromptTag(uids[i - i % size], size, str(pair_ids[i]), str(sides[i]), str(sources[i])) for i in range(len(uids))
    ]
    for start in range(0, len(tags), size):
        group = tags[start : start + size]
        pairs = {(tag.pair_id, side) for tag in group for side in ("query", "target")}
        whole = len(group) == len(pairs) == size and len({tag.source for tag in group}) == 1
        if not whole or {(tag.pair_id, tag.side) for tag in group} != pairs:
            held = ", ".join(f"{tag.pair_id} {tag.side} ({tag.source})" for tag in group)
            raise EmbedderError(
                f"prompts must be submitted in groups of {size // 2} whole pair(s) of one data source; got {held}"
            )
    return tags


@dataclass(frozen=True)
class Group:
    """A group whose prompts are all there. `step`: training step in which its oldest prompt was submitted."""

    uids: tuple[str, ...]
    pair_ids: frozenset[str]
    source: str
    step: int


def complete_groups(tags: Mapping[str, PromptTag], uids: Iterable[str], steps: Mapping[str, int]) -> list[Group]:
    """Groups of which every prompt is among `uids`, oldest first; of one step, in the order of `tags`.

    Args:
        tags: of every prompt in the queue, in the order of submission.
        uids: prompts to look at.
        steps: training step in which a prompt was submitted.
    """
    wanted = set(uids)
    members: dict[str, list[str]] = defaultdict(list)
    for uid, tag in tags.items():
        if uid in wanted:
            members[tag.group].append(uid)
    groups = [
        Group(
            uids=tuple(found),
            pair_ids=frozenset(tags[uid].pair_id for uid in found),
            source=tags[found[0]].source,
            step=min(steps[uid] for uid in found),
        )
        for found in members.values()
        if len(found) == tags[found[0]].size
    ]
    return sorted(groups, key=lambda group: group.step)


def fill_batches(groups: Iterable[Group], prompts: int) -> dict[str, list[Group]]:
    """For each data source the groups that would be trained on, oldest first: at most `prompts` prompts, no pair twice.

    Sources come in the order of their oldest group.
    """
    chosen: dict[str, list[Group]] = {}
    for group in groups:
        taken = chosen.setdefault(group.source, [])
        room = prompts - _prompts(taken)
        if len(group.uids) <= room and all(group.pair_ids.isdisjoint(one.pair_ids) for one in taken):
            taken.append(group)
    return chosen


def next_batch(groups: Iterable[Group], prompts: int) -> list[Group] | None:
    """The batch of the source with the oldest group among those that can fill one; None if none can."""
    return next((taken for taken in fill_batches(groups, prompts).values() if _prompts(taken) == prompts), None)


def _prompts(groups: Iterable[Group]) -> int:
    return sum(len(group.uids) for group in groups)


# ---------------------------------------------------------------------- buffers


def replay_buffer(trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> ReplayBuffer:
    """The buffer of a trainer mode, with the arguments that verl gives a custom sampler."""
    if "poll_interval" not in sampler_kwargs:
        raise ConfigError("trainer.v1.sampler.sampler_kwargs.poll_interval (seconds) is missing")
    kwargs |= {"trainer_mode": trainer_mode, "sampler_kwargs": sampler_kwargs}
    cls = ReplayBuffer if trainer_mode == "sync" else PairReplayBuffer
    return cls(poll_interval=float(sampler_kwargs["poll_interval"]), **kwargs)


class PairReplayBuffer(ReplayBufferAsync):
    """`ReplayBufferAsync` whose batches hold whole groups of one data source, the oldest first.

    A group is sampled, dropped as stale or replaced after a failure as a whole, and only when none of its prompts is
    still running: so nothing can write rows of a group that is gone. When no source can fill a batch and nothing is in
    flight that could, more prompts are asked for; with S sources and batches of N groups that ends at the latest with
    S (N - 1) + 1 groups in the queue.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        return not self._sampling or next_batch(self._groups(sampleable_keys), batch_size) is not None

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, Any], dict[str, int]]:
        oldest, partition, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        if partition_id == VALIDATION:
            return oldest, partition, steps
        groups = next_batch(self._groups(sampleable_keys), batch_size)
        assert groups is not None  # _has_enough_samples has looked at the same snapshot
        return [uid for group in groups for uid in group.uids], partition, steps

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        if partition_id != VALIDATION and not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
            # Prompts that the nearest source lacks for a batch, or all sources together for the number waited for.
            groups = self._groups(self.finished_keys[partition_id])
            found = _prompts(groups)
            if self._sampling:
                found = max(map(_prompts, fill_batches(groups, self._target).values()), default=0)
            self.refill_fn(self._target - found)
        return super()._wait_for_next_poll(partition_id, last_debug_time)
