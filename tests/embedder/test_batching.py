# SPDX-License-Identifier: Apache-2.0
"""Token-budget batches: every row once, within the budget, longest rows first; on every rank as many; vectors come
back in the caller's order at length 1."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.embedder import Encoded
from embedrl_verl.embedder.batching import (
    budget_batches,
    failed_rows,
    fill,
    pack_rows,
    pad_rows,
    pool_last,
    restore,
    unit,
)
from embedrl_verl.errors import EmbedderError


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    max_tokens=st.integers(1, 1000),
    max_rows=st.none() | st.integers(1, 8),
    padded=st.booleans(),
)
def test_every_row_is_in_one_batch_within_the_budget_and_neighbours_could_not_be_one(
    lengths, max_tokens, max_rows, padded
):
    batches = budget_batches(lengths, max_tokens, max_rows, padded=padded)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))

    def cost(batch: list[int]) -> int:
        return len(batch) * lengths[batch[0]] if padded else sum(lengths[i] for i in batch)

    for batch in batches:
        assert cost(batch) <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    for before, after in pairwise(batches):
        assert cost([*before, after[0]]) > max_tokens or len(before) == max_rows
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_a_budget_must_be_positive():
    with pytest.raises(EmbedderError, match="at least 1; got 0"):
        budget_batches([1], 0)


@given(
    ranks=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=4),
    budget=st.integers(1, 200),
    multiple=st.integers(1, 4),
)
def test_all_ranks_run_as_many_micro_batches_and_each_row_counts_once_and_in_its_place(ranks, budget, multiple):
    plans = [budget_batches(lengths, budget, padded=True) for lengths in ranks]
    most = max(map(len, plans))
    filled = [fill(plan, most, multiple) for plan in plans]
    assert len({len(batches) for batches in filled}) == 1
    assert len(filled[0]) % multiple == 0 and most <= len(filled[0]) < most + multiple
    for lengths, batches in zip(ranks, filled, strict=True):
        assert sorted(i for batch in batches if batch.real for i in batch.rows) == list(range(len(lengths)))
        assert all(lengths[i] == min(lengths) for batch in batches if not batch.real for i in batch.rows)
        vectors = [torch.tensor([[float(i), -float(i)] for i in batch.rows]) + (not batch.real) for batch in batches]
        expected = [[float(i), -float(i)] for i in range(len(lengths))]
        assert restore(batches, vectors, len(lengths)).tolist() == expected


def test_a_rank_without_rows_is_refused():
    with pytest.raises(EmbedderError, match="give every data-parallel rank at least one row"):
        fill([], 3)


def row(length: int) -> Encoded:
    media = {"pixel_values": torch.full((4, 2), float(length)), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    return Encoded(torch.arange(1, length + 1), torch.arange(length).repeat(4, 1), media if length > 2 else {})


def test_packed_rows_follow_one_another_and_padding_is_on_the_right():
    rows = [row(n) for n in (3, 2, 5)]
    packed = pack_rows(rows)
    assert packed.input_ids.tolist() == [[1, 2, 3, 1, 2, 1, 2, 3, 4, 5]] and packed.last.tolist() == [2, 4, 9]
    assert packed.position_ids.shape == (4, 1, 10) and packed.position_ids[0, 0].tolist() == [0, 1, 2, 0, 1, *range(5)]
    for multiple, length in ((1, 5), (2, 6), (4, 8), (5, 5)):
        padded, extra = pad_rows(rows, multiple=multiple), [0] * (length - 5)
        assert padded.input_ids.tolist() == [[1, 2, 3, 0, 0, *extra], [1, 2, 0, 0, 0, *extra], [1, 2, 3, 4, 5, *extra]]
        assert padded.position_ids.shape == (3, 3, length) and padded.last.tolist() == [2, 1, 4]
        assert padded.position_ids[:, 2].tolist() == [[0, 1, 2, 3, 4, *extra]] * 3
        for both in (packed, padded):
            assert both.media["pixel_values"][:, 0].tolist() == [3.0] * 4 + [5.0] * 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pooling_in_slices_adds_up_to_pooling_the_whole_sequence(ranks):
    lengths = torch.tensor([1, 5, 8, 3])
    hidden = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))
    for number, length in enumerate(lengths):
        hidden[length:, number] = torch.nan  # padding never enters, whatever it holds
    hidden.requires_grad_()
    step = 8 // ranks
    pooled = sum(pool_last(hidden[i : i + step], lengths - 1, i) for i in range(0, 8, step))
    assert torch.equal(pooled, torch.stack([hidden[n - 1, number] for number, n in enumerate(lengths)]))
    pooled.sum().backward()
    touched = torch.zeros(8, 4)
    touched[lengths - 1, torch.arange(4)] = 1.0
    assert torch.equal(hidden.grad, touched[..., None].expand(8, 4, 6))


def test_a_vector_without_direction_is_nan_and_others_have_length_1():
    pooled = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]], dtype=torch.bfloat16)
    vectors = unit(pooled)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors[0], torch.tensor([0.6, 0.8])) and vectors[1:].isnan().all()
    assert failed_rows(vectors) == [1, 2, 3]
