# SPDX-License-Identifier: Apache-2.0
"""The driver's client of the Embedder's worker group: embed rows, and take a contrastive step on them.

Rows are dealt so that every rank gets about the same tokens, and come back in the caller's order. A row without a
finite vector is reported with its reason and is NaN, never zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayWorkerGroup
from verl.utils import tensordict_utils as tu

from embedrl_verl.embedder.batching import Embedded
from embedrl_verl.embedder.engine import INFERENCE, ROW_FIELDS, rows_of, tensordict_of
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.embedder.streaming import read_vectors
from embedrl_verl.embedder.two_pass import GRADIENT, after_update
from embedrl_verl.embedder.worker import USE_AVERAGE
from embedrl_verl.errors import EmbedderError
from embedrl_verl.platforms.training_worker import rebuild_position_ids


class EmbedderClient:
    """Embeds rows on a worker group. All methods block until the vectors are there."""

    def __init__(self, group: RayWorkerGroup) -> None:
        self._group = group

    def embed(self, rows: Sequence[Encoded], *, averaged: bool = False) -> Embedded:
        """Embed rows held by the driver, with the moving average of the weights if `averaged`."""
        if not rows:
            raise EmbedderError("there is nothing to embed: the list of rows is empty")
        ranks = self._group.world_size
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        padded = order + order[-1:] * (-len(order) % ranks)
        dealt = _deal(padded, ranks)
        data = tensordict_of([rows[i] for i in dealt])
        tu.assign_non_tensor(data, **{USE_AVERAGE: averaged})
        output = self._group.infer_batch(data).get()
        received = output["embeddings"]
        vectors = torch.empty(len(rows), received.shape[-1])
        vectors[dealt] = received
        return Embedded.of(vectors)

    def embed_rows(self, keys: Sequence[str], partition_id: str, *, averaged: bool = False) -> Embedded:
        """Embed rows that lie in TransferQueue; their pixels go straight to the workers.

        Neighbouring keys should be of similar length (rollouts of one prompt): they are dealt to different ranks.
        """
        if not keys:
            raise EmbedderError("there is nothing to embed: the list of keys is empty")
        ranks = self._group.world_size
        if len(keys) < ranks:  # a rank without rows could not take part in FSDP's collectives
            data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=list(ROW_FIELDS))
            rebuild_position_ids(data)
            return self.embed(rows_of(data), averaged=averaged)
        info = {**INFERENCE, USE_AVERAGE: averaged}
        meta = _queued(_deal(list(keys), ranks), partition_id, ROW_FIELDS, info)
        ray.get(self._group.infer_batch(meta).futures)
        return Embedded.of(read_vectors(keys, partition_id))

    def train_rows(self, keys: Sequence[str], gradients: torch.Tensor, partition_id: str) -> dict[str, float]:
        """Pass 2 of a contrastive step over rows of TransferQueue, one optimizer step and one of the schedule.

        Args:
            keys: rows with a finite vector, each once.
            gradients: float32 (len(keys), D), d loss / d vector of each row.
        """
        ranks = self._group.world_size
        if len(set(keys)) != len(keys) or len(gradients) != len(keys):
            raise EmbedderError(
                f"each row needs one gradient; got {len(keys)} keys, {len(set(keys))} different ones, and "
                f"{len(gradients)} gradients"
            )
        if len(keys) < ranks:
            raise EmbedderError(f"{len(keys)} rows cannot be dealt to {ranks} devices; train on more rollouts")
        fields = TensorDict({GRADIENT: gradients.float()}, batch_size=[len(keys)])
        tq.kv_batch_put(keys=list(keys), partition_id=partition_id, fields=fields)
        order = _deal(list(keys), ranks)
        meta = _queued(order, partition_id, (*ROW_FIELDS, GRADIENT), {"update_lr_scheduler": True})
        return after_update(tu.get(self._group.train_batch(meta).get(), "metrics"))

    def save(self, folder: str, step: int, keep: int | None = None) -> None:
        """Write weights, optimizer, schedule, random state and the average; `keep` = how many of this run's stay."""
        self._group.save_checkpoint(folder, None, step, keep)

    def load(self, folder: str) -> None:
        """Read what `save` wrote."""
        self._group.load_checkpoint(folder, None, False)


def _queued(keys: list[str], partition_id: str, fields: Sequence[str], info: dict[str, Any]) -> KVBatchMeta:
    return KVBatchMeta(
        keys=keys, tags=[{} for _ in keys], partition_id=partition_id, fields=list(fields), extra_info=info
    )


def _deal(items: list[Any], ranks: int) -> list[Any]:
    """Reorder so that consecutive chunks, one a rank, hold every `ranks`-th item."""
    return [item for rank in range(ranks) for item in items[rank::ranks]]
