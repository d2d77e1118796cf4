# SPDX-License-Identifier: Apache-2.0
"""Token-budget batches: every row once, within the budget, similar lengths together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.embedder import Encoded
from embedrl_verl.embedder.batching import pad_rows, token_budget_batches
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


def test_a_budget_must_be_positive():
    with pytest.raises(EmbedderError, match="at least 1; got 0"):
        token_budget_batches([1], 0)


def test_padding_is_on_the_right_and_media_stay_in_row_order():
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
    padded = pad_rows(rows)
    assert padded.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert padded.position_ids.shape == (3, 3, 5) and padded.last.tolist() == [2, 1, 4]
    assert padded.media["pixel_values"][:, 0].tolist() == [3.0] * 4 + [5.0] * 4
