# SPDX-License-Identifier: Apache-2.0
"""Batches of rows under a token budget: packed one after another, or padded (Megatron).

Rows are dealt longest first: short ones fill what is left, and in a padded batch, which costs rows x longest row, they
are of similar length. The order of the caller comes back through the indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import EmbedderError

MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def token_budget_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Indices of rows, longest rows first, such that rows x longest row <= max_tokens in every batch.

    A row over the budget is a batch of its own: it has to run, and nothing shorter is held up by it.

    Raises:
        EmbedderError: a budget or row limit that is not positive.
    """
    _check_limits(max_tokens, max_rows)
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room < 1:
            batches.append([])
            room = max(1, max_tokens // max(lengths[index], 1))
            room = room if max_rows is None else min(room, max_rows)
        batches[-1].append(index)
        room -= 1
    return batches


def packed_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Indices of rows, longest rows first, such that the rows of every batch have at most `max_tokens` tokens together.

    A row over the budget is a batch of its own.

    Raises:
        EmbedderError: a budget or row limit that is not positive.
    """
    _check_limits(max_tokens, max_rows)
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[index] > room or len(batches[-1]) == max_rows:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _check_limits(max_tokens: int, max_rows: int | None) -> None:
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise EmbedderError(f"max_tokens and max_rows must be at least 1; got {max_tokens} and {max_rows}")


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows on one device, one after another; T tokens together.

    Attributes:
        input_ids: int64 (1, T).
        position_ids: int64 (4, 1, T): text positions, from 0 in each row, and the M-RoPE axes.
        last: int64 (B,), index of each row's last token.
        media: the rows' `multi_modal_inputs`, concatenated.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    media: dict[str, torch.Tensor]


def pack_rows(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> PackedRows:
    """Put rows one after another."""
    ids = torch.cat([row.input_ids for row in rows])[None]
    positions = torch.cat([row.position_ids for row in rows], dim=-1)[:, None]
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    return PackedRows(ids.to(device), positions.to(device), last.to(device), _media_of(rows, device))


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Rows on one device, padded on the right.

    Attributes:
        input_ids: int64 (B, L).
        position_ids: int64 (3, B, L), M-RoPE axes.
        last: int64 (B,), index of each row's last token.
        media: the rows' `multi_modal_inputs`, concatenated.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    media: dict[str, torch.Tensor]


def pad_rows(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> PaddedRows:
    """Pad rows to the longest of them. Attention is causal, so no row sees its padding (token 0 at position 0)."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        positions[:, i, : len(row)] = row.position_ids[1:]
    last = torch.tensor([len(row) - 1 for row in rows])
    return PaddedRows(ids.to(device), positions.to(device), last.to(device), _media_of(rows, device))


def _media_of(rows: Sequence[Encoded], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {
        key: torch.cat([row.multi_modal_inputs[key] for row in rows if key in row.multi_modal_inputs]).to(device)
        for key in MEDIA_KEYS
        if any(key in row.multi_modal_inputs for row in rows)
    }
