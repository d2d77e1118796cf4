# SPDX-License-Identifier: Apache-2.0
"""The Embedder as a verl worker group of its own processes, and the driver's client of it.

The group sits on the actor's devices (or on a pool of its own) and gives their memory back between uses. It is frozen
unless somebody calls `train_batch`: everything that training needs is inherited from verl's TrainingWorker.

Rows are dealt so that every rank gets about the same tokens, and come back in the caller's order. A row without a
finite vector is reported with its reason and is NaN, never zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.config import CheckpointConfig
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.engine import INFERENCE, MODEL_TYPE, ROW_FIELDS, rows_of, tensordict_of
from embedrl_verl.embedder.loading import check_profile, load_config
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.embedder.profiles import resolve_profile
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.platforms.position_ids import rebuild_position_ids
from embedrl_verl.platforms.training_worker import NestedPositionIdsTrainingWorker

NOT_FINITE = "the Embedder gave a vector that is not finite"
_PRECISION = {"bfloat16": "bf16", "float32": "fp32"}


class EmbedderWorker(NestedPositionIdsTrainingWorker):
    """verl's TrainingWorker over the engine `embedding_model`; `infer_batch` returns {"embeddings": (b, D) float32}.

    Being defined here, it imports and thereby registers the engine in every process that unpickles it.
    """


class EmbeddedRows(NamedTuple):
    """Result of the client.

    Attributes:
        vectors: float32 (N, D) on the CPU, in the order asked for; length 1, or NaN where the row failed.
        failures: position of each failed row -> reason.
    """

    vectors: torch.Tensor
    failures: dict[int, str]


def worker_config(
    config: EmbedderConfig, *, ranks_per_node: int, optimizer: FSDPOptimizerConfig | None = None
) -> TrainingWorkerConfig:
    """What an `EmbedderWorker` is built from. Shards lie within a node; nodes hold replicas.

    Args:
        config: the section `embedrl.embedder`.
        ranks_per_node: devices of the pool on one node.
        optimizer: for co-training; a frozen Embedder keeps verl's defaults, whose state is never allocated.

    Raises:
        ConfigError: strategy fsdp on a CPU.
        EmbedderError: the checkpoint and the profile do not fit.
    """
    assert config.path is not None  # EmbedderConfig refuses a missing path
    on_cpu = get_device_name() == "cpu"
    if on_cpu and config.strategy != "fsdp2":
        raise ConfigError(f"embedrl.embedder.strategy must be fsdp2 on a CPU; got {config.strategy}")
    check_profile(config.path, load_config(config.path), resolve_profile(config.path, config.profile))
    precision = _PRECISION[config.dtype]
    offload = config.offload and not on_cpu
    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=HFModelConfig(
            path=config.path,
            use_remove_padding=False,
            override_config={"attn_implementation": config.attn_implementation},
        ),
        engine_config=FSDPEngineConfig(
            strategy=config.strategy,
            fsdp_size=ranks_per_node,
            model_dtype=precision,
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            param_offload=offload,
            optimizer_offload=offload,
            max_token_len_per_gpu=config.max_tokens_per_gpu,
            infer_max_token_len_per_gpu=config.max_tokens_per_gpu,
            use_torch_compile=False,
        ),
        optimizer_config=optimizer or FSDPOptimizerConfig(total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )


def build_embedder_worker_group(run_config: Any, config: EmbedderConfig, resource_pool: Any) -> RayWorkerGroup:
    """Start the Embedder on a pool and load it; returns when all ranks hold their weights.

    Args:
        run_config: the whole configuration; only `trainer.ray_wait_register_center_timeout` is read.
        config: the section `embedrl.embedder`.
        resource_pool: verl's RayResourcePool, shared with other groups or its own.

    Raises:
        ConfigError, EmbedderError: as `worker_config`, before any process starts.
    """
    init = RayClassWithInitArgs(
        cls=ray.remote(EmbedderWorker), config=worker_config(config, ranks_per_node=resource_pool.store[0])
    )
    group = RayWorkerGroup(
        resource_pool=resource_pool,
        ray_cls_with_init=init,
        device_name=get_device_name(),
        ray_wait_register_center_timeout=run_config.trainer.ray_wait_register_center_timeout,
    )
    group.reset()
    return group


class EmbedderClient:
    """Embeds rows on a worker group. All methods block until the vectors are there."""

    def __init__(self, group: RayWorkerGroup) -> None:
        self._group = group

    def embed(self, rows: Sequence[Encoded]) -> EmbeddedRows:
        """Embed rows held by the driver.

        Raises:
            EmbedderError: no rows.
        """
        if not rows:
            raise EmbedderError("there is nothing to embed: the list of rows is empty")
        ranks = self._group.world_size
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        padded = order + order[-1:] * (-len(order) % ranks)
        dealt = _deal(padded, ranks)
        output = self._group.infer_batch(tensordict_of([rows[i] for i in dealt])).get()
        received = output["embeddings"]
        vectors = torch.empty(len(rows), received.shape[-1])
        vectors[dealt] = received
        return _report(vectors)

    def embed_rows(self, keys: Sequence[str], partition_id: str) -> EmbeddedRows:
        """Embed rows that lie in TransferQueue; their pixels go straight to the workers.

        Neighbouring keys should be of similar length (rollouts of one prompt): they are dealt to different ranks.

        Raises:
            EmbedderError: no keys, or keys that the partition does not have.
        """
        if not keys:
            raise EmbedderError("there is nothing to embed: the list of keys is empty")
        ranks = self._group.world_size
        if len(keys) < ranks:  # a rank without rows could not take part in FSDP's collectives
            data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=list(ROW_FIELDS))
            rebuild_position_ids(data)
            return self.embed(rows_of(data))
        dealt = _deal(list(keys), ranks)
        meta = KVBatchMeta(
            keys=dealt,
            tags=[{} for _ in dealt],
            partition_id=partition_id,
            fields=list(ROW_FIELDS),
            extra_info=dict(INFERENCE),
        )
        ray.get(self._group.infer_batch(meta).futures)
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=["embeddings"])
        if len(data) != len(keys) or "embeddings" not in set(data.keys()):
            raise EmbedderError(
                f"asked for {len(keys)} rows of partition {partition_id!r}, got {len(data)} with {sorted(data.keys())}"
            )
        return _report(torch.stack(list(data["embeddings"].unbind())))


def _deal(items: list[Any], ranks: int) -> list[Any]:
    """Reorder so that consecutive chunks, one a rank, hold every `ranks`-th item."""
    return [item for rank in range(ranks) for item in items[rank::ranks]]


def _report(vectors: torch.Tensor) -> EmbeddedRows:
    failed = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    vectors[failed] = float("nan")
    return EmbeddedRows(vectors, dict.fromkeys(failed, NOT_FINITE))
