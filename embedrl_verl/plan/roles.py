# SPDX-License-Identifier: Apache-2.0
"""Memory of each role of a run (actor, reference, Embedder) on its device, from its part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config.batch import BatchPlan, is_megatron, longest_row, ulysses_size
from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms.footprint import (
    BF16,
    FP32,
    LOGIT_ENTROPY_BYTES,
    LOGIT_FORWARD_BYTES,
    Fsdp,
    Megatron,
    Shape,
)


@dataclass(frozen=True)
class RoleMemory:
    """A trained or frozen model's bytes on its device.

    Attributes:
        weights, moments: where they are loaded; moments are the optimizer's (Megatron: with float32 weights).
        keeps_weights, keeps_moments: they stay there between uses.
        forward, update: passes, over what is loaded.
        buffers: what stays with the weights (Megatron's gradients).
    """

    weights: float
    moments: float
    keeps_weights: bool
    keeps_moments: bool
    forward: float
    update: float
    buffers: float = 0.0

    @property
    def resting(self) -> float:
        return (self.weights + self.buffers) * self.keeps_weights + self.idle

    @property
    def idle(self) -> float:
        """Beside the weights in a pass without gradients."""
        return self.moments * self.keeps_moments


def has_reference(config: Any) -> bool:
    """With an adapter verl takes the actor without it."""
    from verl.trainer.ppo.utils import need_reference_policy

    return bool(need_reference_policy(config)) and not int(config.actor_rollout_ref.model.lora_rank)


def number(section: Any, key: str, name: str) -> float:
    """A key that verl lets be null."""
    value = section.get(key)
    if value is None:
        raise ConfigError(f"{name}.{key} must be a number; got null")
    return float(value)


def _tokens(config: Any, role: str, prefix: str) -> tuple[int, int]:
    """Tokens of one micro-batch of a role, and those of them that are visual when prompts are nothing else."""
    section, longest = OmegaConf.select(config, role), longest_row(config)
    if section.get(f"{prefix}use_dynamic_bsz"):
        tokens = int(number(section, f"{prefix or 'ppo_'}max_token_len_per_gpu", role))
    else:
        tokens = int(section.get(f"{prefix or 'ppo_'}micro_batch_size_per_gpu") or 1) * longest
    # Sequence parallelism divides the text, and every rank runs all pictures.
    return tokens, ulysses_size(config) * tokens * int(config.data.max_prompt_length) // max(longest, 1)


def actor_memory(config: Any, batch: BatchPlan, shape: Shape) -> RoleMemory:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    train = _tokens(config, "actor_rollout_ref.actor", "")
    infer = _tokens(config, "actor_rollout_ref.rollout", "log_prob_")
    if is_megatron(config):
        split = megatron_of(actor.megatron, shape, batch.devices, trained=True)
        keeps = not actor.megatron.param_offload, not actor.megatron.optimizer_offload
        passes = split.forward(*infer), split.update(*train)
        return RoleMemory(split.weights, split.optimizer, *keeps, *passes, split.gradients)
    sharding, lora, fused = actor.fsdp_config, int(model.lora_rank), bool(model.use_fused_kernels)
    shards = min(int(sharding.fsdp_size), batch.devices) if int(sharding.fsdp_size) > 0 else batch.devices
    fsdp = Fsdp(shape, shards, _adapter(shape, lora) if lora else shape.parameters)
    checkpointing = bool(model.enable_gradient_checkpointing)
    return RoleMemory(
        fsdp.weights,
        fsdp.optimizer,
        not sharding.param_offload,
        not sharding.optimizer_offload,
        fsdp.forward(*infer, logit_bytes=0 if fused else LOGIT_ENTROPY_BYTES),
        fsdp.update(*train, fused=fused, checkpointing=checkpointing),
    )


def megatron_of(mesh: Any, shape: Shape, ranks: int, *, trained: bool) -> Megatron:
    tensor, pipeline = int(mesh.tensor_model_parallel_size), int(mesh.pipeline_model_parallel_size)
    return Megatron(shape, tensor, pipeline, ranks, trained, int(mesh.get("expert_model_parallel_size", 1) or 1))


def _adapter(shape: Shape, rank: int) -> int:
    """Parameters of a LoRA of all linear maps of the decoder."""
    return shape.layers * rank * (8 * shape.hidden + 3 * (shape.hidden + shape.ffn))


def embedder_memory(config: Any, batch: BatchPlan, embedder: EmbedderConfig, shape: Shape) -> RoleMemory:
    train, keeps = embedder.train, not embedder.offload
    per_node = embedder.n_gpus_per_node or int(config.trainer.n_gpus_per_node)
    infer, tokens = embedder.max_tokens_per_gpu, train.max_tokens_per_gpu
    if embedder.strategy == "megatron":
        ranks = embedder.nnodes * embedder.n_gpus_per_node or batch.devices
        tp, pp = embedder.tensor_model_parallel_size, embedder.pipeline_model_parallel_size
        one = Megatron(shape, tp, pp, ranks, trained=train.enable, logits=False)
        passes = one.forward(infer, infer), one.update(tokens, tokens)
        return RoleMemory(one.weights, one.optimizer, keeps, keeps, *passes, one.gradients)
    compute = BF16 if embedder.dtype == "bfloat16" else FP32
    fsdp = Fsdp(shape, per_node, trained_parameters(shape, train), FP32 if train.enable else compute, compute)
    update = fsdp.update(tokens, tokens, fused=True, checkpointing=train.gradient_checkpointing, loss=False)
    return RoleMemory(fsdp.weights, fsdp.optimizer, keeps, keeps, fsdp.forward(infer, infer), update)


def trained_parameters(shape: Shape, train: EmbedderTrainConfig) -> int:
    """Parameters of the Embedder with a gradient."""
    if not train.enable:
        return 0
    return _adapter(shape, train.lora_rank) if train.lora_rank else shape.parameters


def reference_pass(config: Any, batch: BatchPlan, shape: Shape) -> float:
    """The reference model's pass; its weights rest on the host."""
    roles, tokens = config.actor_rollout_ref, _tokens(config, "actor_rollout_ref.ref", "log_prob_")
    if str(roles.ref.strategy) == "megatron":
        one = megatron_of(roles.ref.megatron, shape, batch.devices, trained=False)
        return one.weights + one.forward(*tokens)
    logits = 0 if roles.model.use_fused_kernels else LOGIT_FORWARD_BYTES
    return Fsdp(shape, batch.devices, 0).forward(*tokens, logit_bytes=logits)
