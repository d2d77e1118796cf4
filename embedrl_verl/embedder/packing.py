# SPDX-License-Identifier: Apache-2.0
"""What the Embedder needs around a model that is split over tensor and pipeline ranks; plain torch, no Megatron.

1. Every data-parallel rank runs the same number of micro-batches: `fill` adds passes whose result is dropped.
2. Under sequence parallelism a rank holds a slice of the sequence, so lengths are multiples of the ranks (`pad_to`),
   and each rank contributes the last tokens that lie in its slice (`pool_last`). The sum over ranks is exact: all but
   one contribution to a row are zero.
3. Vectors come back in the order of the batch (`restore`).
4. Settings that cannot work are refused before anything is built (`check_engine_config`).

Shapes: S tokens of the padded rows, R ranks, B rows of a micro-batch, D dimensions, N rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from embedrl_verl.embedder.batching import PaddedRows
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.families import FACTS

CONVERTED = tuple(family for family, facts in FACTS.items() if facts.megatron)


class MicroBatch(NamedTuple):
    """One forward pass.

    Attributes:
        rows: indices into the batch.
        real: False for a pass that only keeps this rank in step with the others.
    """

    rows: list[int]
    real: bool


def fill(plan: Sequence[list[int]], most: int, multiple: int = 1) -> list[MicroBatch]:
    """The micro-batches of `plan`, then repetitions of its shortest row.

    Args:
        plan: row indices of each micro-batch, longest rows first, as `token_budget_batches` gives them.
        most: micro-batches of the data-parallel rank that has most.
        multiple: the number must divide by it (groups of an interleaved pipeline).

    Raises:
        EmbedderError: no rows, or a plan longer than `most`.
    """
    if not plan or len(plan) > most:
        raise EmbedderError(
            f"a rank must have 1 to {most} micro-batches (the most of any rank); its plan has {len(plan)}. Give every "
            "data-parallel rank at least one row"
        )
    missing = -(-most // multiple) * multiple - len(plan)
    return [MicroBatch(rows, True) for rows in plan] + [MicroBatch(plan[-1][-1:], False)] * missing


def pad_to(rows: PaddedRows, multiple: int) -> PaddedRows:
    """Right padding (token 0 at position 0) to a length that divides by `multiple`."""
    missing = -rows.input_ids.shape[1] % multiple
    if not missing:
        return rows
    return replace(
        rows,
        input_ids=functional.pad(rows.input_ids, (0, missing)),
        position_ids=functional.pad(rows.position_ids, (0, missing)),
    )


def pool_last(hidden: torch.Tensor, last: torch.Tensor, first: int = 0) -> torch.Tensor:
    """States (B, D) of the last tokens that lie in this slice of the sequence, zeros for the other rows.

    Padding and other tokens do not enter, whatever they hold, NaN included.

    Args:
        hidden: (S / R, B, D), tokens `first` to `first + S / R` of every row.
        last: int64 (B,), index of each row's last token in the whole sequence.
        first: index of the first token of this slice.
    """
    here = (last >= first) & (last < first + len(hidden))
    states = hidden[(last - first).clamp(0, len(hidden) - 1), torch.arange(len(last), device=last.device)]
    return torch.where(here[:, None], states, torch.zeros_like(states))


def unit(pooled: torch.Tensor) -> torch.Tensor:
    """float32 (B, D) at length 1; a row that is not finite or has no direction has NaN."""
    pooled = pooled.float()
    vectors: torch.Tensor = pooled / pooled.norm(dim=-1, keepdim=True)
    return vectors


def restore(batches: Sequence[MicroBatch], vectors: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """float32 (N, D) on the CPU in the order of the batch, from the (B, D) vectors of each micro-batch.

    Raises:
        EmbedderError: the real micro-batches do not hold each of the `count` rows once.
    """
    held = sorted(row for batch in batches if batch.real for row in batch.rows)
    if held != list(range(count)) or len(batches) != len(vectors):
        raise EmbedderError(
            f"{count} rows must come back once each; {len(vectors)} results of {len(batches)} micro-batches hold {held}"
        )
    result = torch.empty(count, vectors[0].shape[-1])
    for batch, part in zip(batches, vectors, strict=True):
        if batch.real:
            result[batch.rows] = part.detach().float().cpu()
    return result


def check_engine_config(config: Any, family: str) -> None:
    """Refuse what this engine cannot run.

    Args:
        config: verl's McoreEngineConfig.
        family: of the checkpoint.

    Raises:
        ConfigError: the first setting that does not work; the message names it.
    """
    if family not in CONVERTED:
        raise ConfigError(
            f"the Embedder under megatron must be one of {', '.join(CONVERTED)}, which Megatron-Bridge converts; got "
            f"{family}. Choose fsdp2"
        )
    needed: dict[str, tuple[Any, str]] = {
        "context_parallel_size": (1, "rows are short, and a rank must hold the whole row to pool it"),
        "dynamic_context_parallel": (False, "it does not support images"),
        "vanilla_mbridge": (False, "the hooks are Megatron-Bridge's"),
        "use_megatron_fsdp": (False, "it overlaps gradients, see below; FSDP itself is the strategy fsdp2"),
        "use_fused_kernels": (False, "they compute log-probabilities, and there are no logits"),
    }
    for name, (value, reason) in needed.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{name} must be {value} for the Embedder ({reason}); got {getattr(config, name)}")
    if (config.override_ddp_config or {}).get("overlap_grad_reduce", False):
        raise ConfigError(
            "override_ddp_config.overlap_grad_reduce must be False for the Embedder: a rank whose rows have no images "
            "has no vision gradients, and Megatron would wait for them; got True"
        )
