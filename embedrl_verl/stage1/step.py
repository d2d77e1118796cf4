# SPDX-License-Identifier: Apache-2.0
"""One update of stage 1 on the rows of this rank; negatives come from all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu

from embedrl_verl.config.schema import EmbedderTrainConfig
from embedrl_verl.embedder.engine import tensordict_of
from embedrl_verl.embedder.info_nce import ContrastiveLayout
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.embedder.two_pass import GRADIENT, after_update, contrastive_gradients
from embedrl_verl.errors import EmbedderError
from embedrl_verl.stage1.rows import Rows


def two_pass_step(worker: Any, batch: Rows, config: EmbedderTrainConfig) -> dict[str, float]:
    """Embed, take the loss over all ranks, backpropagate, update.

    Returns:
        Metrics of the whole batch: those of `contrastive_gradients` and of `after_update`.
    """
    vectors = embed_local(worker, batch.rows)
    own = len(batch.layout.query_pair)
    queries, targets, layouts = zip(*gather((vectors[:own], vectors[own:], batch.layout)), strict=True)
    names = ("query_pair", "target_pair", "query_content", "target_content")
    layout = ContrastiveLayout(*(torch.cat([getattr(one, name) for one in layouts]) for name in names))
    query, target = torch.cat(queries), torch.cat(targets)
    if failed := int((~torch.cat([query, target]).isfinite().all(dim=1)).sum()):
        raise EmbedderError(
            f"{failed} of {len(query) + len(target)} vectors are not finite, so the loss would be NaN; the checkpoint "
            "is broken, or overflows in this dtype (try embedrl.embedder.dtype=float32), or the learning rate is too "
            "high"
        )
    gradients = contrastive_gradients(query, target, layout, **config.loss_options())
    rank = dist.get_rank()
    of_query = gradients.query.split([len(one) for one in queries])[rank]
    of_target = gradients.target.split([len(one) for one in targets])[rank]
    data = tensordict_of(batch.rows)
    data[GRADIENT] = torch.cat([of_query, of_target])
    tu.assign_non_tensor(data, update_lr_scheduler=True)
    return {**gradients.metrics, **after_update(tu.get(worker.train_batch(data), "metrics"))}


def embed_local(worker: Any, rows: list[Encoded]) -> torch.Tensor:
    """Vectors float32 (n, D) of this rank's rows, on the CPU; all ranks must call it together."""
    vectors: torch.Tensor = worker.infer_batch(tensordict_of(rows))["embeddings"]
    return vectors


def gather(value: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    received: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(received, value)
    return received
