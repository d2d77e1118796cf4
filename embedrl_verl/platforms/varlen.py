# SPDX-License-Identifier: Apache-2.0
"""The attention `torch_varlen`: packed rows without flash-attn, by torch's own kernel.

torch 2.11 has FlashAttention-2 with its backward pass (`torch.nn.attention.varlen`), so nothing has to be compiled or
installed. The kernel takes bfloat16 and float16 on CUDA; elsewhere rows go through torch's scaled-dot-product
attention, which gives the same numbers without a kernel of its own.

`register` makes the name known to transformers. Actors need two changes of verl beside it (platforms.patches). The name
must not hold "flash": transformers would ask for that package.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from embedrl_verl.errors import ConfigError

NAME = "torch_varlen"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_KNOWN = "_embedrl_rows"


class Rows(NamedTuple):
    """Where the rows of a packed sequence lie."""

    bounds: torch.Tensor  # int32 (N + 1,), from 0 to the number of tokens
    lengths: list[int]  # tokens of each row


def register() -> None:
    """Let transformers run `attn_implementation=torch_varlen` in this process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    from embedrl_verl.platforms import patches

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)  # no mask: causal, and packed by positions
    patches.give_vision_rows_at_once(NAME)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each row of one packed sequence, as transformers calls it.

    Args:
        query: (1, heads, T, D); key, value: (1, heads or a divisor of it, T, D).
        position_ids: int (1, T), each row counted from 0. A model's text layers have it.
        cu_seq_lens_q: int (N + 1,), bounds of the rows. A vision model's layers have it. With neither, one row.
        is_causal: None = as the layer says.

    Returns:
        (1, T, heads, D), and no weights.
    """
    for name, found, allowed in (
        ("attention mask", attention_mask is not None, False),
        ("sliding window", sliding_window, None),
        ("dropout", dropout, 0.0),
        ("number of sequences", query.shape[0], 1),
        ("number of keys", key.shape[2], query.shape[2]),
    ):
        if found != allowed:
            raise ConfigError(
                f"attention {NAME} is for one packed sequence: {name} must be {allowed}; got {found}. "
                "Use attention=sdpa for padded rows"
            )
    causal = module.is_causal if is_causal is None else is_causal
    rows = rows_of(position_ids, cu_seq_lens_q, query)
    if sum(rows.lengths) != query.shape[2]:
        raise ConfigError(
            f"attention {NAME}: rows must cover the {query.shape[2]} tokens; they have {sum(rows.lengths)}. Under "
            "sequence parallelism use attention=flash_attention_2"
        )
    if query.is_cuda:
        if query.dtype in _KERNEL_DTYPES:
            return _by_kernel(query, key, value, rows, causal, scaling)[None], None
        # In float32, grouped keys would go through the kernel that keeps all scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    # Neighbours of one length in one call: images of a size, rows sorted by length.
    runs = [(length, len(list(same))) for length, same in groupby(rows.lengths)]
    sizes = [length * count for length, count in runs]
    parts = zip(runs, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
    results = []
    for (length, count), *states in parts:
        q, k, v = (one.unflatten(1, (count, length)).transpose(0, 1) for one in states)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[None], None


def rows_of(positions: torch.Tensor | None, bounds: torch.Tensor | None, query: torch.Tensor) -> Rows:
    """The rows as the layer's arguments tell them.

    All layers are given the same tensor, so what was read from it once (the device waits for that) stays with it.
    """
    source = bounds if bounds is not None else positions
    if source is None:
        count = query.shape[2]
        return Rows(torch.tensor([0, count], dtype=torch.int32, device=query.device), [count])
    known: Rows | None = getattr(source, _KNOWN, None)
    if known is None:
        if bounds is None:
            starts = (source.reshape(-1) == 0).nonzero().reshape(-1)
            bounds = torch.cat((starts, starts.new_tensor([source.numel()])))
        bounds = bounds.to(torch.int32).detach()  # not `source` itself, which is to hold it
        known = Rows(bounds, bounds.diff().tolist())
        setattr(source, _KNOWN, known)
    return known


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, causal: bool, scaling: float | None
) -> torch.Tensor:
    """(T, heads, D) by torch's kernel, which has no grouped keys: they are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    longest = max(rows.lengths)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, rows.bounds, rows.bounds, longest, longest, scale=scaling, window_size=window)
    assert isinstance(out, torch.Tensor)  # with other arguments a tuple
    return out
