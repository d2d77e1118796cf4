# SPDX-License-Identifier: Apache-2.0
"""The attention `torch_varlen` keeps rows apart and refuses what is not one packed sequence."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms import varlen

LAYER = SimpleNamespace(is_causal=True)
LENGTHS = [3, 1, 7]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 3, 4, 11])


def tensors(heads: int = 4, kv_heads: int = 2, tokens: int = 11) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, tokens, 8, generator=generator) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given", [{"position_ids": POSITIONS}, {"cu_seq_lens_q": BOUNDS}])
def test_each_row_attends_to_itself_alone(causal, given):
    query, key, value = tensors()
    out, weights = varlen.attend(LAYER, query, key, value, None, is_causal=causal, scaling=0.3, **given)
    assert weights is None and out.shape == (1, 11, 4, 8)
    for first, last in pairwise(BOUNDS):
        row = [one[:, :, first:last] for one in (query, key, value)]
        own = scaled_dot_product_attention(*row, is_causal=causal, scale=0.3, enable_gqa=True)
        assert torch.equal(out[:, first:last], own.transpose(1, 2))


def test_without_bounds_there_is_one_row():
    query, key, value = tensors()
    out, _ = varlen.attend(LAYER, query, key, value, None)
    own = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.equal(out, own.transpose(1, 2))


def test_bounds_are_read_from_a_tensor_once():
    positions = POSITIONS.clone()
    rows = varlen.rows_of(positions, None, tensors()[0])
    assert rows.lengths == LENGTHS and rows.bounds.tolist() == BOUNDS.tolist() and rows.bounds.dtype == torch.int32
    assert varlen.rows_of(positions, None, tensors()[0]) is rows


def test_the_kernel_is_asked_for_the_same_rows(monkeypatch):
    """It runs on CUDA only; here a stand-in takes its arguments."""
    asked = {}

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        asked.update(bounds=cu_seq_q.tolist(), longest=(max_q, max_k), scale=scale, window=window_size)
        assert cu_seq_k is cu_seq_q and q.shape == k.shape == v.shape
        rows = [one.transpose(0, 1)[None].split(LENGTHS, dim=2) for one in (q, k, v)]
        causal = window_size == (-1, 0)
        parts = [scaled_dot_product_attention(*row, is_causal=causal, scale=scale) for row in zip(*rows, strict=True)]
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    query, key, value = tensors()
    rows = varlen.rows_of(POSITIONS.clone(), None, query)
    for causal in (True, False):
        out = varlen._by_kernel(query, key, value, rows, causal, 0.3)
        assert asked == {"bounds": [0, 3, 4, 11], "longest": (7, 7), "scale": 0.3, "window": (-1, 0 if causal else -1)}
        own, _ = varlen.attend(LAYER, query, key, value, None, position_ids=POSITIONS, is_causal=causal, scaling=0.3)
        torch.testing.assert_close(out, own[0])


@pytest.mark.parametrize("positions", [POSITIONS[:, 1:], 5 + POSITIONS[:, 4:]])
def test_a_part_of_the_rows_is_refused(positions):
    """As a rank has it under sequence parallelism."""
    part = [one[:, :, : positions.shape[1]] for one in tensors()]
    with pytest.raises(ConfigError, match=r"rows must cover the \d+ tokens; they have"):
        varlen.attend(LAYER, *part, None, position_ids=positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, 11)}, "attention mask must be False; got True"),
        ({"sliding_window": 4}, "sliding window must be None; got 4"),
        ({"dropout": 0.1}, "dropout must be 0.0; got 0.1"),
        ({"query": torch.zeros(2, 4, 11, 8)}, "number of sequences must be 1; got 2"),
        ({"key": torch.zeros(1, 2, 12, 8)}, "number of keys must be 11; got 12"),
    ],
)
def test_what_only_padded_rows_have_is_refused(change, message):
    arguments = dict(zip(("query", "key", "value"), tensors(), strict=True), attention_mask=None)
    with pytest.raises(ConfigError, match=f"{message}. Use attention=sdpa"):
        varlen.attend(LAYER, **{**arguments, **change})
