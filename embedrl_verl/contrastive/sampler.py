# SPDX-License-Identifier: Apache-2.0
"""Batches of stage 1: sub-batches of one source each, drawn by weight x size, few video sub-batches a batch.

An epoch's plan is a function of the data, the settings and (seed, epoch): resuming at a step needs no saved state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from embedrl_verl.errors import ConfigError

Pairs = np.ndarray[Any, np.dtype[np.int64]]


class Batch(NamedTuple):
    """One update: its pairs (indices into the data set, sub-batches one after the other), and if they are raw."""

    pairs: Pairs
    raw: bool


class SubBatchPlan:
    """The batches of every epoch.

    Args:
        sources: source of each pair, by index.
        batch_pairs, sub_batch_pairs: pairs of a batch, and of each of its single-source parts.
        weights: source -> weight; 1 where not named.
        video_sources: sources of which at most `max_video_sub_batches` parts stand in one batch.
        raw_share: share of the batches without T-CoT.

    Raises:
        ConfigError: a weight for an unknown source, a source that cannot fill one sub-batch, or video sources alone
            that could never fill a batch.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        batch_pairs: int,
        sub_batch_pairs: int,
        weights: Mapping[str, float] | None = None,
        video_sources: Collection[str] = (),
        max_video_sub_batches: int = 1,
        raw_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        pairs_of: dict[str, list[int]] = defaultdict(list)
        for index, source in enumerate(sources):
            pairs_of[source].append(index)
        self._pairs_of = {source: np.array(pairs_of[source]) for source in sorted(pairs_of)}
        self._weights = dict(weights or {})
        unknown = sorted(set(self._weights) - set(self._pairs_of))
        if unknown:
            raise ConfigError(
                f"contrastive.source_weights names {', '.join(unknown)}; the data has {', '.join(self._pairs_of)}"
            )
        self._sub, self._parts = sub_batch_pairs, batch_pairs // sub_batch_pairs
        self._video, self._max_video = set(video_sources), max_video_sub_batches
        self._raw_share, self._seed = raw_share, seed
        short = [
            f"{source} ({len(pairs)} pairs)"
            for source, pairs in self._pairs_of.items()
            if not self._count(source) or len(pairs) < sub_batch_pairs
        ]
        if short or not self._pairs_of:
            raise ConfigError(
                f"a sub-batch holds {sub_batch_pairs} different pairs of one source; too few in "
                f"{', '.join(short) or 'the empty data set'}. Lower contrastive.sub_batch_pairs, raise the source's "
                "weight or leave it out"
            )
        if self._parts > self._max_video and set(self._pairs_of) <= self._video:
            raise ConfigError(
                f"a batch has {self._parts} sub-batches, at most {self._max_video} of them of videos, and all sources "
                "are videos; set contrastive.max_video_sub_batches higher"
            )
        if not self.epoch(0):
            raise ConfigError(
                f"an epoch of {len(sources)} pairs has no batch of {batch_pairs} pairs with at most {self._max_video} "
                "video sub-batch(es); lower contrastive.batch_pairs"
            )

    def _count(self, source: str) -> int:
        """Sub-batches of a source in an epoch."""
        return int(self._weights.get(source, 1.0) * len(self._pairs_of[source]) // self._sub)

    def epoch(self, epoch: int) -> list[Batch]:
        """All batches of an epoch, in order. Sub-batches that fill no batch are left out."""
        rng = np.random.default_rng([self._seed, epoch])
        films: list[Pairs] = []
        others: list[Pairs] = []
        for source, pairs in self._pairs_of.items():
            parts: list[Pairs] = []
            while len(parts) < self._count(source):
                shuffled = rng.permutation(pairs)
                parts += list(shuffled[: len(pairs) // self._sub * self._sub].reshape(-1, self._sub))
            (films if source in self._video else others).extend(parts[: self._count(source)])
        films = [films[i] for i in rng.permutation(len(films))]
        others = [others[i] for i in rng.permutation(len(others))]
        batches: list[list[Pairs]] = []
        while True:
            left = (len(films) + len(others)) // self._parts
            # Films are spread evenly over the batches that are still to come.
            wanted = min(self._max_video, -(-len(films) // max(left, 1)))
            count = max(wanted, self._parts - len(others))
            if count > min(self._max_video, len(films)) or left == 0:
                break
            parts = [films.pop() for _ in range(count)] + [others.pop() for _ in range(self._parts - count)]
            batches.append([parts[i] for i in rng.permutation(len(parts))])
        order = rng.permutation(len(batches))
        raw = rng.random(len(batches)) < self._raw_share
        return [Batch(np.concatenate(batches[i]), bool(raw[i])) for i in order]

    def from_step(self, done: int) -> Iterator[Batch]:
        """Endless batches, after `done` updates."""
        epoch = 0
        while True:
            batches = self.epoch(epoch)
            yield from batches[done:]
            done = max(0, done - len(batches))
            epoch += 1

    def steps(self, epochs: int) -> int:
        """Updates of so many epochs."""
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))
