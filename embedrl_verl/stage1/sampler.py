# SPDX-License-Identifier: Apache-2.0
"""Batches of stage 1: sub-batches of one source each, drawn by weight x size, few video sub-batches a batch.

An epoch's plan is a function of the data, the settings and (seed, epoch): resuming at a step needs no saved state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from embedrl_verl.data.schema import SIDES
from embedrl_verl.data.table import PairTable
from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.settings import Stage1Config

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
        names = np.array(sources)
        self._pairs_of: dict[str, Pairs] = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
        self._sub, self._parts_a_batch = sub_batch_pairs, batch_pairs // sub_batch_pairs
        self._video, self._max_video = set(video_sources), max_video_sub_batches
        self._raw_share, self._seed = raw_share, seed
        weights = weights or {}
        if unknown := sorted(set(weights) - set(self._pairs_of)):
            raise ConfigError(
                f"contrastive.source_weights names {', '.join(unknown)}; the data has {', '.join(self._pairs_of)}"
            )
        # Sub-batches of a source in an epoch.
        self._parts_of = {
            source: int(weights.get(source, 1.0) * len(pairs) // self._sub) for source, pairs in self._pairs_of.items()
        }
        short = [
            f"{source} ({len(pairs)} pairs)"
            for source, pairs in self._pairs_of.items()
            if not self._parts_of[source] or len(pairs) < self._sub
        ]
        if short:
            raise ConfigError(
                f"a sub-batch holds {self._sub} different pairs of one source; too few in {', '.join(short)}. Lower "
                "contrastive.sub_batch_pairs, raise the source's weight or leave it out"
            )
        if not self.epoch(0):
            raise ConfigError(
                f"an epoch of {len(sources)} pairs has no batch of {batch_pairs} pairs with at most {self._max_video} "
                "video sub-batch(es); lower contrastive.batch_pairs, or raise contrastive.max_video_sub_batches"
            )

    def epoch(self, epoch: int) -> list[Batch]:
        """All batches of an epoch, in order. Sub-batches that fill no batch are left out."""
        rng = np.random.default_rng([self._seed, epoch])
        videos: list[Pairs] = []
        others: list[Pairs] = []
        for source, pairs in self._pairs_of.items():
            parts: list[Pairs] = []
            while len(parts) < self._parts_of[source]:
                shuffled = rng.permutation(pairs)
                parts += list(shuffled[: len(pairs) // self._sub * self._sub].reshape(-1, self._sub))
            (videos if source in self._video else others).extend(parts[: self._parts_of[source]])
        videos = [videos[i] for i in rng.permutation(len(videos))]
        others = [others[i] for i in rng.permutation(len(others))]
        batches: list[list[Pairs]] = []
        while left := (len(videos) + len(others)) // self._parts_a_batch:
            # Videos are spread evenly over the batches that are still to come.
            wanted = min(self._max_video, -(-len(videos) // left))
            count = max(wanted, self._parts_a_batch - len(others))
            if count > min(self._max_video, len(videos)):
                break
            parts = [videos.pop() for _ in range(count)]
            parts += [others.pop() for _ in range(self._parts_a_batch - count)]
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


def plan_batches(config: Stage1Config, pairs: PairTable) -> SubBatchPlan:
    """The batches of a run over these pairs; a source with a video on either side of a pair is a video source."""
    run, sources = config.contrastive, pairs.column("data_source")
    videos = [pc.is_valid(pc.struct_field(pairs.column(side), "video")) for side in SIDES]
    return SubBatchPlan(
        sources.to_pylist(),
        batch_pairs=run.batch_pairs,
        sub_batch_pairs=run.sub_batch_pairs,
        weights=run.source_weights,
        video_sources=set(pc.unique(sources.filter(pc.or_(*videos))).to_pylist()),
        max_video_sub_batches=run.max_video_sub_batches,
        raw_share=run.raw_share if config.data.tcot else 0.0,
        seed=run.seed,
    )
