# SPDX-License-Identifier: Apache-2.0
"""What a worker is built from: engine and optimizer of each strategy, what is refused before processes start, and how
it runs out of memory."""

from __future__ import annotations

import json

import pytest
import torch
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, McoreEngineConfig, McoreOptimizerConfig

from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
from embedrl_verl.embedder import worker
from embedrl_verl.embedder.engine import explained_out_of_memory
from embedrl_verl.errors import ConfigError, EmbedderError


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(worker, "get_device_name", lambda: "cuda")


def config(path, *, train=None, **settings) -> EmbedderConfig:
    return EmbedderConfig(path=str(path), train=EmbedderTrainConfig(**(train or {})), **settings)


def test_a_frozen_embedder_is_held_in_its_dtype_a_trained_one_in_float32(checkpoint, on_gpu):
    frozen = worker.worker_config(config(checkpoint()), ranks_per_node=4)
    assert isinstance(frozen.engine_config, FSDPEngineConfig) and frozen.engine_config.model_dtype == "bf16"
    assert frozen.engine_config.fsdp_size == 4 and frozen.engine_config.param_offload
    assert frozen.model_config.lora_rank == 0 and frozen.extra_context == {"ema_decay": 0.0}
    train = {"enable": True, "lora_rank": 8, "lora_alpha": 16, "ema_decay": 0.9}
    trained = worker.worker_config(config(checkpoint(), train=train), ranks_per_node=4, total_steps=30)
    assert trained.engine_config.model_dtype == "fp32"
    assert trained.engine_config.mixed_precision["param_dtype"] == "bf16"
    assert trained.model_config.lora_rank == 8 and trained.extra_context == {"ema_decay": 0.9}
    assert isinstance(trained.optimizer_config, FSDPOptimizerConfig)
    assert trained.optimizer_config.total_training_steps == 31


@pytest.mark.parametrize("enable", [False, True])
def test_megatron_gets_its_own_engine_and_optimizer(checkpoint, on_gpu, enable):
    made = worker.worker_config(
        config(
            checkpoint("qwen3_vl"),
            strategy="megatron",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            train={"enable": enable, "lr_scheduler": "cosine", "lr": 1e-4, "min_lr_ratio": 0.1},
        ),
        ranks_per_node=8,
    )
    engine = made.engine_config
    assert isinstance(engine, McoreEngineConfig) and engine.strategy == "megatron"
    assert (engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size) == (2, 2)
    assert engine.sequence_parallel and engine.dtype == "bfloat16" and engine.forward_only is not enable
    # What the engine's hooks cannot stand: split rows, other converters, gradients that are waited for.
    assert (engine.context_parallel_size, engine.dynamic_context_parallel) == (1, False)
    assert not (engine.vanilla_mbridge or engine.use_megatron_fsdp or engine.use_fused_kernels)
    assert engine.override_ddp_config == engine.override_transformer_config == {}
    assert isinstance(made.optimizer_config, McoreOptimizerConfig)
    assert made.optimizer_config.lr_decay_style == "cosine" and made.optimizer_config.min_lr == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, "lora_dropout is 0.1; training in two passes needs 0"),
        ({"r": 2, "lora_alpha": 8}, "r is 2; embedrl.embedder.train says 4"),
        ({"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}, None),
    ],
)
def test_an_adapter_to_go_on_from_must_be_the_runs_own(checkpoint, on_gpu, tmp_path, adapter, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    train = {"enable": True, "lora_rank": 4, "lora_alpha": 8, "lora_adapter_path": str(tmp_path)}
    made = config(checkpoint(), train=train)
    if message is None:
        assert worker.worker_config(made, ranks_per_node=1).model_config.lora_adapter_path == str(tmp_path)
    else:
        with pytest.raises(ConfigError, match=message):
            worker.worker_config(made, ranks_per_node=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fsdp"}, "must be fsdp2 on a CPU; got fsdp"),
        ({"strategy": "megatron"}, "must be fsdp2 on a CPU; got megatron"),
        (
            {"train": {"enable": True, "lora_rank": 2, "lora_alpha": 4, "lora_adapter_path": "nowhere"}},
            "must be a folder with adapter_config.json; got nowhere",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(checkpoint, monkeypatch, settings, message):
    monkeypatch.setattr(worker, "get_device_name", lambda: "cpu")
    with pytest.raises(ConfigError, match=message):
        worker.worker_config(config(checkpoint(), **settings), ranks_per_node=1)


def test_megatron_is_refused_for_a_family_that_its_bridge_does_not_convert(checkpoint, on_gpu):
    with pytest.raises(ConfigError, match="must be one of qwen2_5_vl, qwen3_vl, .* got qwen2_vl. Choose fsdp2"):
        worker.worker_config(config(checkpoint(), strategy="megatron"), ranks_per_node=1)


def allocate() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def fail_on_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("fails", [allocate, fail_on_the_device])
@pytest.mark.parametrize(
    ("training", "key"),
    [(True, "embedrl.embedder.train.max_tokens_per_gpu"), (False, "embedrl.embedder.max_tokens_per_gpu")],
)
def test_out_of_memory_names_the_micro_batch_and_the_keys_to_lower(fails, training, key):
    with (
        pytest.raises(EmbedderError, match=f"micro-batch of 3 row.s. with 96 tokens .*Lower {key}"),
        explained_out_of_memory(rows=3, tokens=96, training=training),
    ):
        fails()


def test_another_error_passes():
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory(rows=1, tokens=2, training=True):
        raise RuntimeError("shapes do not fit")
