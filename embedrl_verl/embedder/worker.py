# SPDX-License-Identifier: Apache-2.0
"""The Embedder as a verl worker group of its own processes.

The group sits on the actor's devices (or on a pool of its own) and gives their memory back between uses. It is frozen
unless the section `embedrl.embedder.train` is on; then pass 2 of the contrastive step (`two_pass`) is a `train_batch`
of verl's TrainingWorker, and a moving average of the weights can stand beside them. `client` is the driver's side.
"""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import (
    EngineConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    McoreEngineConfig,
    McoreOptimizerConfig,
    OptimizerConfig,
    TrainingWorkerConfig,
)

from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
from embedrl_verl.embedder.ema import ShadowWeights
from embedrl_verl.embedder.engine import MODEL_TYPE
from embedrl_verl.embedder.loading import load_config
from embedrl_verl.embedder.profiles import fitting_profile
from embedrl_verl.embedder.two_pass import refuse_dropout, surrogate_loss
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.families import FACTS, facts_of
from embedrl_verl.platforms.training_worker import NestedPositionIdsTrainingWorker

CONTENTS = ("model", "optimizer", "extra")
USE_AVERAGE = "use_average"
"""Batch information for `infer_batch`: embed with the moving average of the weights."""
_PRECISION = {"bfloat16": "bf16", "float32": "fp32"}


class EmbedderWorker(NestedPositionIdsTrainingWorker):
    """verl's TrainingWorker over the engine `embedding_model`; `infer_batch` returns {"embeddings": (b, D) float32}.

    Being defined here, it imports and thereby registers the engine in every process that unpickles it. With
    `extra_context["ema_decay"]` above 0 it keeps a `ShadowWeights` of what it trains.
    """

    average: ShadowWeights | None = None

    def __init__(self, config: TrainingWorkerConfig) -> None:
        if config.engine_config.strategy == "megatron":
            importlib.import_module("embedrl_verl.embedder.megatron_engine")  # registers the engine
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Load the weights again, with a fresh optimizer and average."""
        super().reset()
        self.set_loss_fn(surrogate_loss)
        decay = self.config.extra_context.get("ema_decay", 0.0)
        self.average = ShadowWeights(self.engine.module, decay) if decay else None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        """Embed rows, with the averaged weights if the batch says `use_average`."""
        averaged = tu.pop(data, key=USE_AVERAGE, default=False)
        if averaged and self.average is None:
            raise EmbedderError("there is no average of the weights: embedrl.embedder.train.ema_decay is 0")
        with self.average.in_place() if averaged and self.average else nullcontext():
            return super().infer_batch(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """Pass 2 of a contrastive step; then the average follows."""
        output = super().train_batch(data)
        if self.average is not None:
            self.average.update()
        return output

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """verl's checkpoint (weights, optimizer, schedule, random state), and the average beside it."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        if self.average is not None:
            torch.save(self.average.state_dict(), self._average_file(local_path))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load both; EmbedderError if another number of devices wrote it, or the run's average is not there."""
        part = f"model_world_size_{self.world_size}_rank_{self.rank}.pt"
        if self.engine_config.strategy != "megatron" and not (Path(local_path) / part).is_file():
            found = sorted(path.name for path in Path(local_path).glob("model_world_size_*_rank_0.pt"))
            raise EmbedderError(
                f"{local_path} has no {part}, so another number of devices wrote it ({', '.join(found) or 'none'} is "
                "there). Resume with as many, or export it and start a new run from the result"
            )
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if self.average is None:
            return
        file = self._average_file(local_path)
        if not file.is_file():
            raise EmbedderError(
                f"{file} is missing: the checkpoint was written with embedrl.embedder.train.ema_decay=0. Resume so, or "
                "start a new run"
            )
        self.average.load_state_dict(torch.load(file, weights_only=True))

    def _average_file(self, local_path: str) -> Path:
        return Path(local_path) / f"average_world_size_{self.world_size}_rank_{self.rank}.pt"


def worker_config(config: EmbedderConfig, *, ranks_per_node: int, total_steps: int = 1) -> TrainingWorkerConfig:
    """What an `EmbedderWorker` is built from; refuses what cannot run. Shards lie within a node; nodes hold replicas.

    A trained Embedder holds its weights in float32 whatever `dtype` says (small updates would be lost in bfloat16), and
    computes in `dtype`. A frozen one has an optimizer too, whose state is never allocated.

    Args:
        ranks_per_node: devices of the pool on one node.
        total_steps: updates of the whole run, for the learning rate's schedule.
    """
    assert config.path is not None  # EmbedderConfig refuses a missing path
    train, on_cpu = config.train, get_device_name() == "cpu"
    _check_strategy(config, on_cpu=on_cpu)
    fitting_profile(config.path, config.profile)
    if train.enable:
        refuse_dropout(load_config(config.path), config.path)
        if train.lora_adapter_path:
            _check_adapter(Path(train.lora_adapter_path), train)
    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=HFModelConfig(
            path=config.path,
            override_config={"attn_implementation": config.attn_implementation},
            enable_gradient_checkpointing=train.enable and train.gradient_checkpointing,
            lora_rank=train.lora_rank if train.enable else 0,
            lora_alpha=train.lora_alpha,
            lora_adapter_path=train.lora_adapter_path if train.enable else None,
            target_modules=train.lora_target_modules,
            exclude_modules=train.lora_exclude_modules or None,
        ),
        engine_config=_engine_config(config, ranks_per_node, offload=config.offload and not on_cpu),
        optimizer_config=_optimizer_config(config, total_steps),
        checkpoint_config=CheckpointConfig(save_contents=list(CONTENTS), load_contents=list(CONTENTS)),
        extra_context={"ema_decay": train.ema_decay if train.enable else 0.0},
    )


def _check_strategy(config: EmbedderConfig, *, on_cpu: bool) -> None:
    if on_cpu and config.strategy != "fsdp2":
        raise ConfigError(f"embedrl.embedder.strategy must be fsdp2 on a CPU; got {config.strategy}")
    model_type = load_config(str(config.path)).model_type
    if config.strategy == "megatron" and model_type not in facts_of(model_type).megatron:
        converted = ", ".join(kind for facts in FACTS.values() for kind in facts.megatron)
        raise ConfigError(
            f"the Embedder under megatron must be one of {converted}, which Megatron-Bridge converts; got "
            f"{model_type}. Choose fsdp2"
        )


def _check_adapter(folder: Path, train: EmbedderTrainConfig) -> None:
    """Refuse an adapter that is not there, has dropout, or another size than the run's settings say."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(
            f"embedrl.embedder.train.lora_adapter_path must be a folder with adapter_config.json; got {folder}"
        )
    adapter = json.loads(file.read_text())
    for key, wanted in (("r", train.lora_rank), ("lora_alpha", train.lora_alpha), ("lora_dropout", 0)):
        found = adapter.get(key, 0)
        if found != wanted:
            setting = "training in two passes needs" if key == "lora_dropout" else "embedrl.embedder.train says"
            raise ConfigError(f"{file}: {key} is {found}; {setting} {wanted}")


def _engine_config(config: EmbedderConfig, ranks_per_node: int, *, offload: bool) -> EngineConfig:
    train, precision = config.train, _PRECISION[config.dtype]
    shared = {
        "param_offload": offload,
        "optimizer_offload": offload,
        "max_token_len_per_gpu": train.max_tokens_per_gpu,
        "infer_max_token_len_per_gpu": config.max_tokens_per_gpu,
    }
    if config.strategy == "megatron":
        return McoreEngineConfig(
            **shared,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            sequence_parallel=config.tensor_model_parallel_size > 1,
            dtype=config.dtype,
            # A frozen one would else hold gradient buffers and optimizer state.
            forward_only=not train.enable,
        )
    return FSDPEngineConfig(
        **shared,
        strategy=config.strategy,
        fsdp_size=ranks_per_node,
        model_dtype="fp32" if train.enable else precision,
        mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
        # The dataclass's default keeps whole fp32 gradients on every rank until the last micro-batch.
        use_no_sync_for_gradient_accumulation=False,
    )


def _optimizer_config(config: EmbedderConfig, total_steps: int) -> OptimizerConfig:
    train = config.train
    shared = {
        "lr": train.lr,
        "lr_warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "clip_grad": train.clip_grad,
        # One more, so that the last update of a cosine does not have a learning rate of 0.
        "total_training_steps": total_steps + 1,
    }
    if config.strategy == "megatron":
        return McoreOptimizerConfig(
            **shared, lr_decay_style=train.lr_scheduler, min_lr=train.min_lr_ratio * train.lr, lr_warmup_init=0.0
        )
    return FSDPOptimizerConfig(
        **shared,
        # verl's constant schedule gives the first update a learning rate of 0, its cosine need not.
        lr_scheduler_type="cosine",
        min_lr_ratio=train.min_lr_ratio if train.lr_scheduler == "cosine" else 1.0,
        zero_indexed_step=False,
    )


def start_embedder_worker_group(
    run_config: Any, config: EmbedderConfig, resource_pool: Any, *, total_steps: int = 1
) -> tuple[RayWorkerGroup, list[ray.ObjectRef]]:
    """Start the Embedder on a pool (verl's RayResourcePool), without waiting for its processes.

    Returns:
        The group, and a reference for each rank that is ready when the rank holds its weights; `ray.get` raises what
        went wrong. What is called on the group before waits for that.
    """
    init = RayClassWithInitArgs(
        cls=ray.remote(EmbedderWorker),
        config=worker_config(config, ranks_per_node=resource_pool.store[0], total_steps=total_steps),
    )
    group = RayWorkerGroup(
        resource_pool=resource_pool,
        ray_cls_with_init=init,
        device_name=get_device_name(),
        ray_wait_register_center_timeout=run_config.trainer.ray_wait_register_center_timeout,
    )
    return group, group.execute_all_async("reset")
