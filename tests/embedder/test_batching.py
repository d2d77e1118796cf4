# SPDX-License-Identifier: Apache-2.0
"""Token-budget batches: every row once, within the budget, longest rows first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.embedder import Encoded
from embedrl_verl.embedder.batching import pack_rows, packed_batches, pad_rows, token_budget_batches
from embedrl_verl.embedder.positions import mrope_positions
from embedrl_verl.errors import EmbedderError


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    max_tokens=st.integers(1, 1000),
    max_rows=st.none() | st.integers(1, 8),
)
def test_every_row_is_in_one_batch_and_padding_included_no_batch_is_over_the_budget(lengths, max_tokens, max_rows):
    batches = token_budget_batches(lengths, max_tokens, max_rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        cost = len(batch) * max(lengths[i] for i in batch)
        assert cost <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    max_tokens=st.integers(1, 1000),
    max_rows=st.none() | st.integers(1, 8),
)
def test_every_row_is_in_one_packed_batch_and_neighbours_could_not_be_one(lengths, max_tokens, max_rows):
    batches = packed_batches(lengths, max_tokens, max_rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    for batch, tokens in zip(batches, sums, strict=True):
        assert tokens <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    for before, tokens, after in zip(batches, sums, batches[1:], strict=False):
        assert tokens + lengths[after[0]] > max_tokens or len(before) == max_rows


@pytest.mark.parametrize("deal", [token_budget_batches, packed_batches])
def test_a_budget_must_be_positive(deal):
    with pytest.raises(EmbedderError, match="at least 1; got 0"):
        deal([1], 0)


def test_packed_rows_follow_one_another_and_padding_is_on_the_right():
    rows = [
        Encoded(
            torch.arange(1, n + 1),
            mrope_positions(n, []),
            {"pixel_values": torch.full((4, 2), float(n)), "image_grid_thw": torch.tensor([[1, 2, 2]])}
            if n > 2
            else {},
        )
        for n in (3, 2, 5)
    ]
    packed = pack_rows(rows)
    assert packed.input_ids.tolist() == [[1, 2, 3, 1, 2, 1, 2, 3, 4, 5]] and packed.last.tolist() == [2, 4, 9]
    assert packed.position_ids.shape == (4, 1, 10) and packed.position_ids[0, 0].tolist() == [0, 1, 2, 0, 1, *range(5)]
    padded = pad_rows(rows)
    assert padded.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert padded.position_ids.shape == (3, 3, 5) and padded.last.tolist() == [2, 1, 4]
    for both in (packed, padded):
        assert both.media["pixel_values"][:, 0].tolist() == [3.0] * 4 + [5.0] * 4
