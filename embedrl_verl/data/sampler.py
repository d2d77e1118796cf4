# SPDX-License-Identifier: Apache-2.0
"""Order of the prompts in an epoch: complete pairs side by side, one data source a batch.

The order is a function of (seed, epoch) alone. A source's pairs are shuffled and cut into blocks of one batch, then the
blocks of all sources are shuffled. With `pairs_together` > 1 runs of that many neighbours are shuffled as one, so that
pairs that a file puts next to each other because they are easily confused meet in a batch, as hard negatives. What is
left of a source after its last full block sits out this epoch, and other pairs will the next. With `data.shuffle=False`
every epoch has the order of the files (a curriculum), and always the same pairs sit out.

The position is (epoch, indices yielded), which is all that a checkpoint holds; torchdata's `StatefulDataLoader` takes
it from the iterator for every batch that it hands out, prefetched ones not included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from embedrl_verl.errors import ConfigError


class PairedDataset(Protocol):
    """A data set whose prompts 2k and 2k + 1 are the query and the target of pair k."""

    @property
    def pair_sources(self) -> Sequence[str]:
        """Data source of each pair."""

    @property
    def fingerprint(self) -> str:
        """Changes with the pairs and their order."""


class PairBatchSampler(Sampler[int]):
    """Yields prompt indices for a data loader with the same `batch_size` (in prompts) and `drop_last`.

    Every pass over the sampler is the next epoch; a pass that was broken off is the same epoch again.

    Args:
        dataset: prompts in pairs.
        batch_size: prompts a batch, two a pair; `config.rules` has seen that whole runs fill it.
        seed: of every shuffle.
        shuffle: False keeps the order of the data set in every epoch: a source's pairs fill batches in their order, and
            batches come in the order of their last pairs.
        pairs_together: length of the runs of neighbouring pairs of one source that are never separated; counted from
            the source's first pair, what is left over at its end is not used.
    """

    def __init__(
        self, dataset: PairedDataset, batch_size: int, seed: int = 0, pairs_together: int = 1, *, shuffle: bool = True
    ) -> None:
        if seed < 0:
            raise ConfigError(f"data.seed must not be negative; got {seed}")
        self._pairs = need = batch_size // 2
        self.shuffle, self.epoch = shuffle, 0
        # What a position is a position in.
        self.identity: dict[str, Any] = {
            "seed": seed,
            "batch_size": batch_size,
            "pairs_together": pairs_together,
            "shuffle": shuffle,
            "data": dataset.fingerprint,
        }
        pairs_of: dict[str, list[int]] = defaultdict(list)
        for pair, source in enumerate(dataset.pair_sources):
            pairs_of[source].append(pair)
        short = [f"{source} ({len(pairs)})" for source, pairs in sorted(pairs_of.items()) if len(pairs) < need]
        if short or not pairs_of:
            raise ConfigError(
                f"a batch of {batch_size} prompts holds {need} pairs of one data source; too few pairs in: "
                f"{', '.join(short) or 'the empty data set'}. Lower data.train_batch_size or leave the source out"
            )
        self._runs_of = {
            source: np.array(pairs[: len(pairs) // pairs_together * pairs_together]).reshape(-1, pairs_together)
            for source, pairs in sorted(pairs_of.items())
        }

    def __len__(self) -> int:
        """Prompts in an epoch, a multiple of the batch size."""
        return sum(runs.size // self._pairs for runs in self._runs_of.values()) * 2 * self._pairs

    def __iter__(self) -> Iterator[int]:
        return _PairIterator(self)

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Prompt indices of an epoch, int64 (len(self),)."""
        rng = np.random.default_rng([self.identity["seed"], epoch])
        blocks = []
        for runs in self._runs_of.values():
            pairs = (rng.permutation(runs) if self.shuffle else runs).reshape(-1)
            blocks.append(pairs[: len(pairs) // self._pairs * self._pairs].reshape(-1, self._pairs))
        pairs_BP = np.concatenate(blocks)  # B batches, P pairs
        pairs_BP = rng.permutation(pairs_BP) if self.shuffle else pairs_BP[pairs_BP[:, -1].argsort()]
        return np.stack([2 * pairs_BP, 2 * pairs_BP + 1], axis=-1).reshape(-1)


class _PairIterator(Iterator[int]):
    """One epoch, with the state that `StatefulDataLoader` saves and loads."""

    def __init__(self, sampler: PairBatchSampler) -> None:
        self._sampler = sampler
        self._start(sampler.epoch, 0)

    def _start(self, epoch: int, yielded: int) -> None:
        self._epoch, self._yielded = epoch, yielded
        self._order = self._sampler.order(epoch)
        self._sampler.epoch = epoch + (yielded >= len(self._order))

    def __next__(self) -> int:
        if self._yielded >= len(self._order):
            self._sampler.epoch = self._epoch + 1
            raise StopIteration
        self._yielded += 1
        return int(self._order[self._yielded - 1])

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and what they are a position in."""
        return {"epoch": self._epoch, "yielded": self._yielded, **self._sampler.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; of another seed, batch size or data it would mean something else."""
        for name, value in self._sampler.identity.items():
            if state_dict.get(name) != value:
                raise ConfigError(
                    f"cannot resume: the checkpoint's {name} is {state_dict.get(name)!r} and this run's is {value!r}; "
                    "go on with the same data, data.seed, data.shuffle, data.train_batch_size and "
                    "data.embedrl.pairs_together, or start a new run"
                )
        self._start(state_dict["epoch"], state_dict["yielded"])
