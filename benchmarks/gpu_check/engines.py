# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engines on one rank with tiny models, as the GPU recipes set them: actor, reference and Embedder.

Log-probs by verl's fused cross-entropy against those of whole logits; an update; the reference's pass with weights on
the host. The Embedder embeds, is trained, offloaded, saved and loaded, and its average is what the updates say. Needs
verl.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_check.stage import Figures, error, measure, need

TEXT = "three pictures of a digit and some words beside it "


def rows_of(folder: str, count: int, words: int) -> list[Any]:
    """Encoded rows, every other with a picture."""
    import numpy as np
    from PIL import Image

    from embedrl_verl.data.media import LoadedItem, MediaLimits
    from embedrl_verl.embedder import EmbedInput
    from embedrl_verl.embedder.processor import EmbedProcessor

    processor = EmbedProcessor.from_pretrained(folder, limits=MediaLimits(28, 1, 64, 1, 64))
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        pixels = random.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        images = (Image.fromarray(pixels),) if number % 2 else ()
        item = LoadedItem(TEXT * (words + number), "Find it.", images, ())
        rows.append(processor.encode(EmbedInput(item)))
    return rows


def loss_of(model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean of the log-probs."""
    return -torch.cat(list(model_output["log_probs"].unbind())).mean(), {}


def actor(folder: str, rows: list[Any], device: str, figures: Figures) -> None:
    """Update and log-probs, with fused cross-entropy and without; then the reference."""
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

    from embedrl_verl.config.compose import compose
    from embedrl_verl.embedder.engine import tensordict_of
    from embedrl_verl.platforms.training_worker import NestedPositionIdsTrainingWorker

    def build(*, fused: bool, frozen: bool) -> Any:
        overrides = [f"actor_rollout_ref.model.path={folder}", f"actor_rollout_ref.model.use_fused_kernels={fused}"]
        config = compose([*overrides, "platform=gpu", "embedrl.embedder.path=x"])
        precision = "bf16" if device == "cuda" else "fp32"
        worker = NestedPositionIdsTrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    param_offload=device == "cuda",
                    optimizer_offload=device == "cuda",
                    forward_only=frozen and device == "cuda",
                    mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                    max_token_len_per_gpu=16384,
                    infer_max_token_len_per_gpu=16384,
                    use_dynamic_bsz=True,
                ),
                optimizer_config=FSDPOptimizerConfig(lr=1e-4, total_training_steps=10),
                checkpoint_config=CheckpointConfig(),
            )
        )
        worker.reset()
        return worker

    def batch(worker: Any) -> Any:
        data = tensordict_of(rows)
        tu.assign_non_tensor(
            data,
            temperature=1.0,
            use_remove_padding=True,
            use_fused_kernels=worker.engine_config.use_fused_kernels,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=16384,
            pad_token_id=0,
        )
        everywhere = [torch.ones_like(row.input_ids) for row in rows]
        data["loss_mask"] = torch.nested.as_nested_tensor(everywhere, layout=torch.jagged)
        return data

    def log_probs(worker: Any) -> torch.Tensor:
        with worker.engine.eval_mode():
            found = worker.engine.infer_batch(batch(worker))["model_output"]["log_probs"]
        return torch.cat([row[:-1] for row in found.unbind()]).float().cpu()

    def update(worker: Any) -> None:
        with worker.engine.train_mode():
            worker.engine.optimizer_zero_grad()
            worker.engine.forward_backward_batch(batch(worker), loss_of, forward_only=False)
            worker.engine.optimizer_step()

    kept, updated = {}, {}
    for fused in (True, False):
        worker, name = build(fused=fused, frozen=False), "fused" if fused else "whole logits"
        kept[fused] = log_probs(worker)
        seconds, peak = measure(lambda worker=worker: update(worker), device)
        figures.values[f"update, {name}"] = {"ms": round(1e3 * seconds, 1), "peak GiB": round(peak, 3)}
        updated[fused] = log_probs(worker)
    limit = 2e-2 if device == "cuda" else 1e-5
    figures.keep("moved by two updates", error(updated[True], kept[True]), at_least=1e-4)
    figures.keep("fused against whole after two updates", error(updated[True], updated[False]), at_most=2 * limit)
    figures.keep("fused against whole log-probs", error(kept[True], kept[False]), at_most=limit)
    reference = log_probs(build(fused=True, frozen=True))
    figures.keep("reference against actor", error(reference, kept[True]), at_most=limit)


def embedder(folder: str, rows: list[Any], device: str, figures: Figures, out: Path) -> None:
    """Embeds, is trained with an average, saved and loaded; each pass after the weights were on the host."""
    from verl.utils import tensordict_utils as tu

    from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
    from embedrl_verl.embedder.ema import ShadowWeights
    from embedrl_verl.embedder.engine import tensordict_of
    from embedrl_verl.embedder.worker import EmbedderWorker, worker_config

    precision = "bfloat16" if device == "cuda" else "float32"
    section = EmbedderConfig(
        path=folder,
        dtype=precision,
        train=EmbedderTrainConfig(enable=True, lr=1e-3, warmup_steps=0, ema_decay=0.5, max_tokens_per_gpu=16384),
    )
    worker = EmbedderWorker(worker_config(section, ranks_per_node=1, total_steps=10))
    worker.reset()
    engine, average = worker.engine, worker.average
    assert isinstance(average, ShadowWeights)

    def batch() -> Any:
        data = tensordict_of(rows)
        tu.assign_non_tensor(data, max_token_len_per_gpu=16384)
        return data

    def vectors() -> torch.Tensor:
        with engine.eval_mode():
            return engine.infer_batch(batch())["model_output"]["embeddings"].float().cpu()

    def weights() -> torch.Tensor:
        if device == "cuda":
            torch.cuda.synchronize()  # verl moves them to the host without waiting
        named = dict(engine.module.named_parameters())
        one = next(one for name, one in named.items() if name.endswith("layers.0.mlp.up_proj.weight"))
        return (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().float().cpu().clone()

    def train() -> None:
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(batch(), push, forward_only=False)
            engine.optimizer_step()
        average.update()

    first = vectors()
    figures.keep("norm of a vector", float(first.norm(dim=1).mean()), at_least=0.99, at_most=1.01)
    expected = weights()
    for _ in range(3):
        train()
        expected = 0.5 * expected + 0.5 * weights()
    with average.in_place():
        figures.keep("average of the weights", error(weights(), expected), at_most=1e-6)
    moved = vectors()
    figures.keep("cosine of trained and first vectors", float((moved * first).sum(1).mean()), at_most=0.9999)
    worker.save_checkpoint(str(out))
    train()
    worker.load_checkpoint(str(out))
    figures.keep("vectors after save and load", error(vectors(), moved), at_most=1e-6)


def push(model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Turns all vectors into one direction."""
    return -model_output["embeddings"].float()[:, 0].sum(), {}


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need("transformers", "verl")
    from embedrl_verl.platforms.ports import free_port
    from recipes.tiny_digits.environment import CPU_ENV
    from recipes.tiny_digits.models import build_tiny_model

    where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**where, "MASTER_PORT": str(free_port()), **(CPU_ENV if device == "cpu" else {})})
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_model(f"{folder}/model", family="qwen2_vl", hidden_size=512 if device == "cuda" else 64))
        rows = rows_of(model, *((64, 8) if device == "cuda" else (4, 1)))
        actor(model, rows, device, figures)
        embedder(model, rows, device, figures, Path(folder) / "checkpoint")
