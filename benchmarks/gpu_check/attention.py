# SPDX-License-Identifier: Apache-2.0
"""Packed attention by torch's kernel against each row by itself: error, time and memory, forward and backward.

The dimensions are Qwen2-VL-7B's (28 query heads, 4 key heads, size 128), causal, bfloat16, rows of 1 to 14,336 tokens
in 32,768. Needs torch only. Without CUDA the same call goes row by row, so that errors are of the packing alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn import functional

from embedrl_verl.platforms import varlen
from gpu_check.stage import Figures, error, measure, share_of_peak

LENGTHS = (14336, 8192, 4096, 3072, 2048, 512, 256, 128, 127, 1)
HEADS, KEY_HEADS, SIZE = 28, 4, 128


def run(device: str, figures: Figures) -> None:
    """The stage."""
    torch.manual_seed(0)
    lengths = list(LENGTHS) if device == "cuda" else [60, 32, 5, 1]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    total = sum(lengths)
    q, k, v = (
        torch.randn(1, heads, total, SIZE, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    weights = torch.randn(1, total, HEADS, SIZE, device=device, dtype=dtype)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    layer = SimpleNamespace(is_causal=True)

    def packed() -> torch.Tensor:
        return varlen.attend(layer, q, k, v, None, position_ids=positions)[0]

    def by_row() -> torch.Tensor:
        parts = zip(*(one.split(lengths, dim=2) for one in (q, k, v)), strict=True)
        rows = [functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(rows, dim=2).transpose(1, 2)

    def exact() -> torch.Tensor:
        """In float64, the shorter rows only: the scores of the longest would not fit."""
        short = [index for index, length in enumerate(lengths) if length <= 2048]
        parts = [[one.split(lengths, dim=2)[index].double() for index in short] for one in (q, k, v)]
        rows = [
            functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat(rows, dim=2).transpose(1, 2)

    def gradients(forward) -> list[torch.Tensor]:
        return list(torch.autograd.grad(forward(), (q, k, v), weights))

    right = exact()
    found = packed()[:, -right.shape[1] :]
    figures.keep("error against float64", error(found, right), at_most=1e-2 if device == "cuda" else 1e-5)
    figures.keep("error against rows", error(packed(), by_row()), at_most=2e-2 if device == "cuda" else 1e-5)
    for name, mine, own in zip("qkv", gradients(packed), gradients(by_row), strict=True):
        figures.keep(f"gradient error {name}", error(mine, own), at_most=3e-2 if device == "cuda" else 1e-5)
    flops = sum(2 * length**2 * HEADS * SIZE for length in lengths)  # causal: half of 4 l^2
    for name, forward in (("packed", packed), ("row by row", by_row)):
        for suffix, work, factor in (("forward", forward, 1.0), ("with backward", lambda f=forward: gradients(f), 3.5)):
            seconds, peak = measure(work, device, repeat=5)
            figures.values[f"{name}, {suffix}"] = {
                "ms": round(1e3 * seconds, 2),
                "peak GiB": round(peak, 2),
                "share of peak": share_of_peak(factor * flops, seconds),
            }
    if device == "cuda":
        native_groups(figures, q, k, v, packed())


def native_groups(figures: Figures, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, right: torch.Tensor) -> None:
    """Whether the kernel takes fewer key heads than query heads, which would save the repeat."""
    from torch.nn.attention.varlen import varlen_attn

    rows = [one.detach().transpose(1, 2)[0] for one in (q, k, v)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    try:
        found = varlen_attn(*rows, bounds, bounds, max(LENGTHS), max(LENGTHS), window_size=(-1, 0))
    except RuntimeError as problem:
        figures.values["grouped keys"] = f"refused: {str(problem).splitlines()[0]}"
        return
    figures.values["grouped keys"] = f"taken, error {error(found[None], right):.1e}"
