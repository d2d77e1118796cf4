# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from embedrl_verl.data.sampler import PairBatchSampler
from embedrl_verl.errors import ConfigError


@dataclass
class Prompts(Dataset[int]):
    """Prompt k is the number k."""

    pair_sources: Sequence[str]
    fingerprint: str = "f"

    def __len__(self):
        return 2 * len(self.pair_sources)

    def __getitem__(self, index):
        return index


MIXED = Prompts(["a"] * 7 + ["b"] * 4 + ["a"] * 2 + ["c"] * 5)


def loader(data=MIXED, workers=0, seed=3):
    sampler = PairBatchSampler(data, batch_size=4, seed=seed)
    return StatefulDataLoader(data, batch_size=4, num_workers=workers, drop_last=True, sampler=sampler)


def batches(data_loader, epochs):
    return [batch.tolist() for _ in range(epochs) for batch in data_loader]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.sampled_from([2, 4, 6]), st.integers(0, 5))
def test_every_batch_holds_complete_pairs_of_one_source(sources, size, seed):
    data = Prompts([source for source in sources if sources.count(source) >= size // 2])
    if not data.pair_sources:
        return
    sampler = PairBatchSampler(data, size, seed)
    for _ in range(2):
        indices = list(sampler)
        assert len(indices) == len(sampler) == len(set(indices))
        assert len(sampler) % size == 0
        for start in range(0, len(indices), size):
            block = indices[start : start + size]
            assert [index + 1 for index in block[::2]] == block[1::2] and all(index % 2 == 0 for index in block[::2])
            assert len({data.pair_sources[index // 2] for index in block}) == 1
        left_out = len(data.pair_sources) - len(indices) // 2
        assert left_out < size // 2 * len(set(data.pair_sources))


def test_epochs_differ_and_are_fixed_by_the_seed():
    first, again, other = (batches(loader(seed=seed), epochs=3) for seed in (3, 3, 4))
    per_epoch = len(first) // 3
    assert first == again
    assert len({str(first[:per_epoch]), str(first[per_epoch : 2 * per_epoch]), str(first[2 * per_epoch :])}) == 3
    assert first != other
    sampler = PairBatchSampler(Prompts(["a"] * 7), batch_size=4)
    assert len({frozenset(range(14)) - frozenset(sampler) for _ in range(20)}) > 1, "others sit out the next epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_loader_goes_on_with_the_same_batches(workers):
    whole = batches(loader(), epochs=3)
    per_epoch = len(whole) // 3
    for done in [0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch, 3 * per_epoch - 1]:
        first = loader(workers=workers)
        head = []
        iterator = iter(first)
        while len(head) < done:  # as verl does: a new iterator when the old one is exhausted
            head += [batch.tolist() for batch in islice(iterator, done - len(head))]
            if len(head) < done:
                iterator = iter(first)
        state = first.state_dict()
        second = loader(workers=workers)
        second.load_state_dict(state)
        tail = batches(second, epochs=3)
        assert head == whole[:done]
        assert tail[: len(whole) - done] == whole[done:], f"after {done} of {len(whole)} batches"


def test_state_taken_after_the_last_batch_leads_to_the_next_epoch():
    first = loader()
    whole = batches(first, epochs=1)
    state = first.state_dict()
    following = batches(first, epochs=1)
    second = loader()
    second.load_state_dict(state)
    assert batches(second, epochs=1) == following != whole


def test_state_is_small_and_plain():
    first = loader()
    next(iter(first))
    state = first.state_dict()["_sampler_iter_state"]["sampler_iter_state"]
    position = {"epoch": 0, "yielded": 4}
    assert state == {**position, "seed": 3, "batch_size": 4, "pairs_together": 1, "shuffle": True, "data": "f"}


@pytest.mark.parametrize(
    ("data", "seed", "message"),
    [(MIXED, 4, "seed is 3 and this run's is 4"), (Prompts(MIXED.pair_sources, "g"), 3, "data is 'f'.*'g'")],
)
def test_state_of_another_run_is_refused(data, seed, message):
    first = loader()
    next(iter(first))
    other = loader(data, seed=seed)
    other.load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match=f"cannot resume: the checkpoint's {message}"):
        next(iter(other))


@pytest.mark.parametrize(
    ("sources", "size", "seed", "message"),
    [
        (["a"] * 8, 4, -1, "seed must not be negative; got -1"),
        (["a"] * 8 + ["b"], 4, 0, r"holds 2 pairs of one data source; too few pairs in: b \(1\)\. Lower"),
        (["a"], 4, 0, r"too few pairs in: a \(1\)"),
        ([], 4, 0, "the empty data set"),
    ],
)
def test_batch_that_cannot_be_filled_is_refused(sources, size, seed, message):
    with pytest.raises(ConfigError, match=message):
        PairBatchSampler(Prompts(sources), size, seed)


def test_neighbours_share_a_batch_and_runs_are_shuffled():
    data = Prompts(["a"] * 12 + ["b"] * 9 + ["c"] * 8)
    sampler = PairBatchSampler(data, batch_size=8, seed=0, pairs_together=2)
    pairs = np.array(list(sampler)).reshape(-1, 4, 2)[:, :, 0] // 2
    start = {"a": 0, "b": 12, "c": 21}
    for batch in pairs:
        source = data.pair_sources[batch[0]]
        firsts = batch[::2] - start[source]
        assert (firsts % 2 == 0).all() and (batch[1::2] == batch[::2] + 1).all()
    assert 20 not in pairs, "the ninth pair of b has no neighbour"
    assert sorted(pairs.reshape(-1)) != pairs.reshape(-1).tolist()
    assert len(sampler) == pairs.size * 2


def test_without_shuffling_every_epoch_has_the_order_of_the_files():
    one = PairBatchSampler(Prompts(["a"] * 7), batch_size=4, shuffle=False)
    assert list(one) == list(one) == list(range(12))  # the last pair fills no batch
    mixed = PairBatchSampler(Prompts(["a", "b", "a", "b", "b", "b", "c", "c"]), batch_size=4, shuffle=False)
    # A source's pairs in their order; batches where their last pair stands.
    assert [mixed.order(epoch).reshape(-1, 4)[:, ::2].tolist() for epoch in (0, 1)] == [
        [[0, 4], [2, 6], [8, 10], [12, 14]]
    ] * 2


def test_without_shuffling_a_batch_comes_when_its_last_pair_does():
    crossed = PairBatchSampler(Prompts(["a", "b", "b", "a"]), batch_size=4, shuffle=False)
    assert list(crossed) == [2, 3, 4, 5, 0, 1, 6, 7]


def test_a_position_of_shuffled_batches_is_none_of_the_files_order():
    state = iter(PairBatchSampler(MIXED, 4)).state_dict()
    with pytest.raises(ConfigError, match="the checkpoint's shuffle is True and this run's is False"):
        iter(PairBatchSampler(MIXED, 4, shuffle=False)).load_state_dict(state)
    del state["shuffle"]
    with pytest.raises(ConfigError, match="shuffle is None"):
        iter(PairBatchSampler(MIXED, 4)).load_state_dict(state)
