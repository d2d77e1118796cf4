# SPDX-License-Identifier: Apache-2.0
"""Rows into batches under a token budget, packed one after another or padded (Megatron), and vectors out of them.

A vector has length 1. One that is not finite or has no direction is NaN: a failed row, never a zero vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import EmbedderError

MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def budget_batches(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None, *, padded: bool = False
) -> list[list[int]]:
    """Indices of rows, longest first, such that a batch costs at most `max_tokens`: the tokens of its rows together,
    or rows x longest row if `padded`.

    Short rows fill what is left, and padded ones are of similar length. A row over the budget is a batch of its own.
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise EmbedderError(f"max_tokens and max_rows must be at least 1; got {max_tokens} and {max_rows}")
    batches: list[list[int]] = []
    room = cost = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = cost if padded else lengths[index]
        if not batches or cost > room or len(batches[-1]) == max_rows:
            batches.append([])
            room, cost = max_tokens, lengths[index]
        batches[-1].append(index)
        room -= cost
    return batches


NOT_FINITE = "the Embedder gave a vector that is not finite or has no direction"
"""Why a row failed that has been embedded, whoever embeds."""


class MicroBatch(NamedTuple):
    """One forward pass of a rank over `rows` of its batch; not `real`: only keeps this rank in step with the others."""

    rows: list[int]
    real: bool


def fill(plan: Sequence[list[int]], most: int, multiple: int = 1) -> list[MicroBatch]:
    """The micro-batches of a plan (longest rows first), then repetitions of its shortest row.

    Args:
        most: micro-batches of the data-parallel rank that has most.
        multiple: the number must divide by it (groups of an interleaved pipeline).
    """
    if not plan:
        raise EmbedderError("a rank has no rows to embed; give every data-parallel rank at least one row")
    missing = -(-most // multiple) * multiple - len(plan)
    return [MicroBatch(rows, True) for rows in plan] + [MicroBatch(plan[-1][-1:], False)] * missing


def restore(batches: Sequence[MicroBatch], vectors: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """float32 (count, D) on the CPU in the order of the rank's batch, from the (B, D) vectors of each micro-batch."""
    result = torch.full((count, vectors[0].shape[-1]), torch.nan)
    for batch, part in zip(batches, vectors, strict=True):
        if batch.real:
            result[batch.rows] = part.detach().float().cpu()
    return result


@dataclass(frozen=True, eq=False)
class RowBatch:
    """B rows on one device: packed one after another (T tokens together), or padded on the right to L tokens each."""

    input_ids: torch.Tensor  # int64 (1, T), or (B, L)
    position_ids: torch.Tensor  # int64 (4, 1, T), text positions from 0 in each row, then M-RoPE; or (3, B, L), M-RoPE
    last: torch.Tensor  # int64 (B,), index of each row's last token
    media: dict[str, torch.Tensor]  # the rows' `multi_modal_inputs`, concatenated


def pack_rows(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> RowBatch:
    """Rows one after another."""
    ids = torch.cat([row.input_ids for row in rows])[None]
    positions = torch.cat([row.position_ids for row in rows], dim=-1)[:, None]
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    return RowBatch(ids.to(device), positions.to(device), last.to(device), _media_of(rows, device))


def pad_rows(rows: Sequence[Encoded], device: torch.device | str = "cpu", multiple: int = 1) -> RowBatch:
    """Rows padded to the longest of them, or to the next length that divides by `multiple` (sequence parallelism).

    Attention is causal, so no row sees its padding (token 0 at position 0).
    """
    longest = max(len(row) for row in rows)
    longest += -longest % multiple
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        positions[:, i, : len(row)] = row.position_ids[1:]
    last = torch.tensor([len(row) - 1 for row in rows])
    return RowBatch(ids.to(device), positions.to(device), last.to(device), _media_of(rows, device))


def _media_of(rows: Sequence[Encoded], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {
        key: torch.cat([row.multi_modal_inputs[key] for row in rows if key in row.multi_modal_inputs]).to(device)
        for key in MEDIA_KEYS
        if any(key in row.multi_modal_inputs for row in rows)
    }


def pool_last(hidden: torch.Tensor, last: torch.Tensor, first: int = 0) -> torch.Tensor:
    """States (B, D) of the last tokens that lie in this slice of the sequence, zeros for the other rows: their sum over
    the slices is exact. Padding and other tokens do not enter, whatever they hold, NaN included.

    Args:
        hidden: (S / R, B, D), tokens `first` to `first + S / R` of every row; S tokens over R tensor ranks.
        last: int64 (B,), index of each row's last token in the whole sequence.
    """
    here = (last >= first) & (last < first + len(hidden))
    states = hidden[(last - first).clamp(0, len(hidden) - 1), torch.arange(len(last), device=last.device)]
    return torch.where(here[:, None], states, torch.zeros_like(states))


def unit(pooled: torch.Tensor) -> torch.Tensor:
    """float32 (B, D) at length 1, NaN where a row is not finite or has no direction; differentiable."""
    pooled = pooled.float()
    length = pooled.norm(dim=-1, keepdim=True)
    return torch.where(length.isfinite() & (length > 0), pooled / length, torch.nan)


def failed_rows(vectors: torch.Tensor) -> list[int]:
    """Indices of the rows (of (B, D)) that are not finite."""
    return (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()


class Embedded(NamedTuple):
    """Vectors of N rows. `failures`: position of each failed row -> reason."""

    vectors: torch.Tensor  # float32 (N, D) on the CPU, in the order asked for; length 1, or NaN where the row failed
    failures: dict[int, str]

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Embedded:
        """Of unit vectors: a row that is not finite throughout becomes NaN and a failure."""
        failed = failed_rows(vectors)
        vectors[failed] = torch.nan
        return cls(vectors, dict.fromkeys(failed, NOT_FINITE))
