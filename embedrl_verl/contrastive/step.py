# SPDX-License-Identifier: Apache-2.0
"""One update of stage 1 on the rows of this rank; negatives come from all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu

from embedrl_verl.config.schema import EmbedderTrainConfig
from embedrl_verl.contrastive.rows import Rows, unmask_ids
from embedrl_verl.embedder.engine import tensordict_of
from embedrl_verl.embedder.info_nce import ContrastiveLayout
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.embedder.two_pass import GRADIENT, contrastive_gradients
from embedrl_verl.errors import EmbedderError


@dataclass(frozen=True, eq=False)
class _Gathered:
    """Rows of all ranks, and which of them are this rank's (queries and targets apart)."""

    query: torch.Tensor
    target: torch.Tensor
    layout: ContrastiveLayout
    own_query: slice
    own_target: slice


def embed_local(worker: Any, rows: list[Encoded]) -> torch.Tensor:
    """Vectors float32 (n, D) of this rank's rows, on the CPU; all ranks must call it together."""
    vectors: torch.Tensor = worker.infer_batch(tensordict_of(rows))["embeddings"]
    return vectors


def two_pass_step(worker: Any, batch: Rows, config: EmbedderTrainConfig) -> dict[str, float]:
    """Embed, take the loss over all ranks, backpropagate, update.

    Args:
        worker: an `EmbedderWorker` of this rank, called directly.
        batch: this rank's rows.

    Returns:
        Metrics of the whole batch: those of `contrastive_gradients`, `grad_norm` before clipping and `lr` of the
        next update.

    Raises:
        NoNegativesError: on all ranks alike; nothing was changed.
        EmbedderError: a row without a finite vector, or a gradient norm that is not finite.
    """
    gathered = _gather(embed_local(worker, batch.rows), batch)
    failed = int((~gathered.query.isfinite().all(dim=1)).sum() + (~gathered.target.isfinite().all(dim=1)).sum())
    if failed:
        raise EmbedderError(
            f"{failed} of {len(gathered.query) + len(gathered.target)} vectors are not finite, so the loss would be "
            "NaN; the checkpoint is broken, or overflows in this dtype (try embedrl.embedder.dtype=float32), or the "
            "learning rate is too high"
        )
    gradients = contrastive_gradients(
        gathered.query,
        gathered.target,
        gathered.layout,
        temperature=config.temperature,
        symmetric=config.symmetric,
        matryoshka_dims=config.matryoshka_dims,
    )
    data = tensordict_of(batch.rows)
    data[GRADIENT] = torch.cat([gradients.query[gathered.own_query], gradients.target[gathered.own_target]])
    tu.assign_non_tensor(data, update_lr_scheduler=True)
    metrics = tu.get(worker.train_batch(data), "metrics")
    norm = float(metrics["grad_norm"])
    if not math.isfinite(norm):
        raise EmbedderError(
            f"the norm of the gradient must be finite; got {norm} at loss {gradients.loss:.4f}. Lower "
            "embedrl.embedder.train.lr, raise its temperature, or compute in float32 (embedrl.embedder.dtype)"
        )
    return {**gradients.metrics, "grad_norm": norm, "lr": float(metrics["lr"])}


def gather(value: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    received: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(received, value)
    return received


def _gather(vectors: torch.Tensor, batch: Rows) -> _Gathered:
    queries = len(batch.layout.query_pair)
    parts = gather((vectors[:queries], vectors[queries:], batch.layout, batch.bare))
    rank = dist.get_rank()
    before_query = sum(len(part[0]) for part in parts[:rank])
    before_target = sum(len(part[1]) for part in parts[:rank])
    names = ("query_pair", "target_pair", "query_content", "target_content")
    return _Gathered(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        unmask_ids(
            ContrastiveLayout(*(torch.cat([getattr(part[2], name) for part in parts]) for name in names)),
            torch.cat([part[3] for part in parts]),
        ),
        slice(before_query, before_query + queries),
        slice(before_target, before_target + len(vectors) - queries),
    )
