# SPDX-License-Identifier: Apache-2.0
"""Which prompts in flight belong together: the asynchronous modes' answer to what a batch is in the synchronous one.

There, prompts are submitted and trained on batch by batch, so pairs cannot come apart. In the asynchronous modes
prompts of many steps lie in one queue and finish in any order. So each submitted prompt carries a tag that names its
group: the two sides of a pair, or of the `data.embedrl.pairs_together` neighbouring pairs that share a batch. A group
is trained on as a whole or dropped as a whole. The same pair may be in flight twice (in two epochs): two groups, which
never share a batch, since its rollouts would be each other's negatives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedrl_verl.errors import EmbedderError

_GROUP, _SIZE = "embedrl_group", "embedrl_group_size"
_PAIR, _SIDE, _SOURCE = "embedrl_pair_id", "embedrl_side", "data_source"


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
        """The tag of a prompt in the queue.

        Raises:
            EmbedderError: the prompt was not submitted by one of this package's asynchronous trainers.
        """
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
    """Tags of prompts in the order of the pair sampler: `size` prompts a group, the sides of a pair side by side.

    Raises:
        EmbedderError: the prompts do not consist of whole groups of one data source.
    """
    tags = [
        PromptTag(uids[i - i % size], size, str(pair_ids[i]), str(sides[i]), str(sources[i])) for i in range(len(uids))
    ]
    for start in range(0, len(tags), size):
        group = tags[start : start + size]
        whole = len(group) == size and len({tag.source for tag in group}) == 1
        pairs = {(tag.pair_id, side) for tag in group for side in ("query", "target")}
        if not whole or {(tag.pair_id, tag.side) for tag in group} != pairs or len(pairs) != size:
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


def batch_of_each_source(groups: Iterable[Group], prompts: int) -> dict[str, list[Group]]:
    """For each data source the groups that would be trained on, oldest first: at most `prompts` prompts, no pair twice.

    Sources come in the order of their oldest group.
    """
    chosen: dict[str, list[Group]] = {}
    for group in groups:
        taken = chosen.setdefault(group.source, [])
        room = prompts - sum(len(one.uids) for one in taken)
        if len(group.uids) <= room and all(group.pair_ids.isdisjoint(one.pair_ids) for one in taken):
            taken.append(group)
    return chosen


def choose_batch(groups: Iterable[Group], prompts: int) -> list[Group] | None:
    """The groups of the next batch: of the source with the oldest group among those that can fill it; None if none can.

    Args:
        groups: oldest first.
        prompts: of a batch; a multiple of a group's.
    """
    for taken in batch_of_each_source(groups, prompts).values():
        if sum(len(group.uids) for group in taken) == prompts:
            return taken
    return None
