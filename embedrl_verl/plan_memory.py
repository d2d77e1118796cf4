# SPDX-License-Identifier: Apache-2.0
"""What a plan says of memory: the most that each stage of a step takes on a device, and what rests on the host.

Every figure is a bound for full micro-batches whose prompts are pictures throughout; real rows take less. Not in them:
what the allocator cannot use. `platforms.footprint` has the formulas and what they were compared with.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms.footprint import BF16, FP32, Fsdp, Megatron, Shape, shape_of
from embedrl_verl.trainer.checks_async import SEPARATE

if TYPE_CHECKING:
    from embedrl_verl.plan import BatchPlan

GIB = 1024**3
ASSUMED_GIB = 80
CONTEXT = int(1.5 * GIB)
"""CUDA and NCCL of one process (assumed, not measured by us)."""
ENGINE = int(2.5 * GIB)
"""What vLLM keeps beside weights and KV cache: activations of its largest batch and CUDA graphs (assumed)."""
USABLE = 0.95
"""Of a device's memory: the rest goes to fragments."""


@dataclass(frozen=True)
class Stage:
    """One stage on one kind of device.

    Attributes:
        name: of the stage.
        device: "training GPU", "rollout GPU", "Embedder's GPU" or "judge's GPU".
        parts: label -> bytes, of which the stage is the sum.
        note: what else is worth knowing.
        remedy: what to change when it does not fit.
    """

    name: str
    device: str
    parts: dict[str, float]
    note: str = ""
    remedy: str = ""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def memory_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> list[tuple[str, str]]:
    """The plan's lines; none on the CPU.

    Raises:
        ConfigError: GPU_MEMORY is no positive number.
    """
    if str(config.trainer.device) == "cpu":
        return []
    paths = [str(config.actor_rollout_ref.model.path), str(section.embedder.path)]
    unknown = [path for path in paths if shape_of(path) is None]
    if unknown:
        return [("memory", f"not estimated: {' and '.join(unknown)} cannot be read here (give a local folder)")]
    total, source = device_memory()
    lines = [
        ("memory", f"GPU of {total / GIB:.0f} GiB ({source}); at most, in GiB, without fragments (docs/gpu.md):"),
    ]
    stages = memory_stages(config, batch, section, total)
    for stage in stages:
        parts = " + ".join(f"{label} {size / GIB:.1f}" for label, size in stage.parts.items() if size > GIB / 20)
        lines.append(("", f"{stage.name:<10} {stage.total / GIB:>5.1f}  {stage.device}: {parts}{stage.note}"))
    tight = [stage for stage in stages if stage.total > USABLE * total]
    for stage in tight:
        lines.append(
            ("warning", f"{stage.name} may need {stage.total / GIB:.0f} of {total / GIB:.0f} GiB: {stage.remedy}")
        )
    if not tight:
        lines.append(("", f"fits: no stage is above {USABLE:.0%} of a GPU"))
    return [*lines, ("host memory", _host(config, batch, section))]


def device_memory() -> tuple[float, str]:
    """Bytes of a GPU and where that is from: the variable GPU_MEMORY (GiB), a GPU of this machine, or 80 GiB.

    Raises:
        ConfigError: GPU_MEMORY is no positive number.
    """
    import torch

    given = os.environ.get("GPU_MEMORY", "")
    if given:
        try:
            number = float(given)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise ConfigError(f"GPU_MEMORY must be the memory of one GPU in GiB, e.g. 80; got {given!r}")
        return number * GIB, "GPU_MEMORY"
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "as here"
    return ASSUMED_GIB * GIB, "assumed; set GPU_MEMORY"


@dataclass(frozen=True)
class _Trained:
    """A model's bytes on its device: `weights` and `optimizer` where they are loaded, `resting` between uses."""

    weights: float
    optimizer: float
    resting: float
    forward: float
    update: float


def memory_stages(config: Any, batch: BatchPlan, section: EmbedRLConfig, total: float) -> list[Stage]:
    """The stages of a step for devices of `total` bytes. Both models must be known."""
    actor, embedder = _actor(config, batch), _embedder(config, batch, section)
    apart = section.embedder.n_gpus_per_node > 0 or section.embedder.backend != "worker"
    beside = 0.0 if apart else embedder.resting
    where = "Embedder's GPU" if apart else "training GPU"
    rest = 0.0 if apart else actor.resting
    context = CONTEXT * (1 if apart else 2)
    offload = "OFFLOAD=True, more GPUs, or a smaller actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    stages = [_rollout(config, total, resting=actor.resting + beside, context=context)]
    if section.embedder.backend == "worker":
        parts = {"Embedder": embedder.weights, "pass": embedder.forward, "actor at rest": rest}
        remedy = "lower embedrl.embedder.max_tokens_per_gpu"
        stages.append(Stage("vectors", where, {**parts, "CUDA": CONTEXT if apart else context}, remedy=remedy))
    stages += _judge(config, total, resting=actor.resting + beside, context=context)
    shared = {"Embedder at rest": beside, "CUDA": context}
    stages.append(
        Stage("log-probs", "training GPU", {"weights": actor.weights, "pass": actor.forward, **shared}, remedy=offload)
    )
    if config.actor_rollout_ref.actor.use_kl_loss:
        parts = {"pass": _reference(config, batch), "actor at rest": actor.resting, **shared}
        remedy = "lower actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
        stages.append(Stage("reference", "training GPU", parts, remedy=remedy))
    parts = {"weights": actor.weights, "Adam": actor.optimizer, "gradients and pass": actor.update, **shared}
    stages.append(Stage("update", "training GPU", parts, remedy=offload))
    if section.embedder.train.enable:
        parts = {"weights": embedder.weights, "Adam": embedder.optimizer, "gradients and pass": embedder.update}
        more = {"actor at rest": rest, "CUDA": CONTEXT if apart else context}
        remedy = "lower embedrl.embedder.train.max_tokens_per_gpu"
        stages.append(Stage("co-training", where, {**parts, **more}, remedy=remedy))
    return stages


def _shape(path: object) -> Shape:
    shape = shape_of(str(path))
    assert shape is not None  # the caller has looked
    return shape


def _visual(config: Any, tokens: int) -> int:
    """Visual tokens of a micro-batch whose prompts are nothing else."""
    prompt, response = int(config.data.max_prompt_length), int(config.data.max_response_length)
    return tokens * prompt // (prompt + response)


def _tokens(section: Any, prefix: str, longest: int) -> int:
    """Tokens of one micro-batch of a role."""
    if section.get(f"{prefix}use_dynamic_bsz"):
        name = "ppo_max_token_len_per_gpu" if not prefix else "log_prob_max_token_len_per_gpu"
        return int(section[name])
    name = "ppo_micro_batch_size_per_gpu" if not prefix else "log_prob_micro_batch_size_per_gpu"
    return int(section.get(name) or 1) * longest


def _actor(config: Any, batch: BatchPlan) -> _Trained:
    roles = config.actor_rollout_ref
    actor, model = roles.actor, roles.model
    shape = _shape(model.path)
    longest = int(config.data.max_prompt_length) + int(config.data.max_response_length)
    train, infer = _tokens(actor, "", longest), _tokens(roles.rollout, "log_prob_", longest)
    if str(actor.strategy) == "megatron":
        mesh = actor.megatron
        tp, pp = int(mesh.tensor_model_parallel_size), int(mesh.pipeline_model_parallel_size)
        one = Megatron(shape, tp, pp, batch.data_parallel, trained=True)
        resting = (0 if mesh.param_offload else one.weights + one.gradients) + (
            0 if mesh.optimizer_offload else one.optimizer
        )
        forward, update = one.forward(infer, _visual(config, infer)), one.update(train, _visual(config, train))
        return _Trained(one.weights, one.optimizer, resting, forward, update)
    sharding = actor.fsdp_config
    shards = int(sharding.fsdp_size) if int(sharding.fsdp_size) > 0 else batch.devices
    trained = _adapter(shape, int(model.lora_rank)) if int(model.lora_rank) else shape.parameters
    sharded = Fsdp(shape, shards, trained)
    weights, optimizer = sharded.weights, sharded.optimizer
    return _Trained(
        weights,
        optimizer,
        (0 if sharding.param_offload else weights) + (0 if sharding.optimizer_offload else optimizer),
        sharded.forward(infer, _visual(config, infer)),
        sharded.update(
            train,
            _visual(config, train),
            fused=bool(model.use_fused_kernels),
            checkpointing=bool(model.enable_gradient_checkpointing),
        ),
    )


def _adapter(shape: Shape, rank: int) -> int:
    """Parameters of a LoRA of all linear maps of the decoder."""
    return shape.layers * rank * (8 * shape.hidden + 3 * (shape.hidden + shape.ffn))


def _embedder(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> _Trained:
    embedder, train = section.embedder, section.embedder.train
    shape = _shape(embedder.path)
    per_node = embedder.n_gpus_per_node or int(config.trainer.n_gpus_per_node)
    trained = 0
    if train.enable:
        trained = _adapter(shape, train.lora_rank) if train.lora_rank else shape.parameters
    compute = BF16 if embedder.dtype == "bfloat16" else FP32
    infer, tokens = embedder.max_tokens_per_gpu, train.max_tokens_per_gpu
    if embedder.strategy == "megatron":
        tp, pp = embedder.tensor_model_parallel_size, embedder.pipeline_model_parallel_size
        ranks = (embedder.nnodes * per_node if embedder.n_gpus_per_node else batch.devices) // (tp * pp)
        one = Megatron(shape, tp, pp, ranks, trained=train.enable)
        resting = 0 if embedder.offload else one.weights + one.gradients + one.optimizer
        return _Trained(one.weights, one.optimizer, resting, one.forward(infer, infer), one.update(tokens, tokens))
    sharded = Fsdp(shape, per_node, trained, FP32 if train.enable else compute, compute)
    resting = 0 if embedder.offload else sharded.weights + sharded.optimizer
    update = sharded.update(tokens, tokens, fused=True, checkpointing=train.gradient_checkpointing, loss=False)
    return _Trained(sharded.weights, sharded.optimizer, resting, sharded.forward(infer, infer), update)


def _reference(config: Any, batch: BatchPlan) -> float:
    """The reference model's pass; its weights rest on the host."""
    reference, shape = config.actor_rollout_ref.ref, _shape(config.actor_rollout_ref.model.path)
    longest = int(config.data.max_prompt_length) + int(config.data.max_response_length)
    tokens = _tokens(reference, "log_prob_", longest)
    if str(reference.strategy) == "megatron":
        mesh = reference.megatron
        tp, pp = int(mesh.tensor_model_parallel_size), int(mesh.pipeline_model_parallel_size)
        one = Megatron(shape, tp, pp, batch.data_parallel, trained=False)
        return one.weights + one.forward(tokens, _visual(config, tokens))
    return Fsdp(shape, batch.devices, 0, BF16).forward(tokens, _visual(config, tokens))


def _rollout(config: Any, total: float, *, resting: float, context: float) -> Stage:
    rollout = config.actor_rollout_ref.rollout
    longest = int(config.data.max_prompt_length) + int(config.data.max_response_length)
    engine, note = _engine(rollout, str(config.actor_rollout_ref.model.path), total, longest)
    if config.trainer.v1.trainer_mode == SEPARATE:
        return Stage("rollout", "rollout GPU", {"vLLM": engine}, note)
    parts = {"vLLM": engine, "at rest": resting, "CUDA": context}
    remedy = "lower actor_rollout_ref.rollout.gpu_memory_utilization, or OFFLOAD=True"
    return Stage("rollout", "training GPU", parts, note, remedy)


def _judge(config: Any, total: float, *, resting: float, context: float) -> list[Stage]:
    served = config.reward.reward_model
    if not served.enable:
        return []
    rollout = served.rollout
    longest = int(rollout.prompt_length) + int(rollout.response_length)
    engine, note = _engine(rollout, str(served.model_path), total, longest)
    if served.enable_resource_pool:
        return [Stage("judge", "judge's GPU", {"vLLM": engine}, note)]
    parts = {"vLLM": engine, "at rest": resting, "CUDA": context}
    remedy = "lower reward.reward_model.rollout.gpu_memory_utilization, or JUDGE_GPUS_PER_NODE=1"
    return [Stage("judge", "training GPU", parts, note, remedy)]


def _engine(rollout: Any, path: str, total: float, longest: int) -> tuple[float, str]:
    """Bytes of a vLLM engine, and what they are used for."""
    taken = float(rollout.gpu_memory_utilization) * total
    shape = shape_of(path)
    if shape is None:
        return taken, f" ({path} cannot be read here)"
    split = int(rollout.tensor_model_parallel_size)
    weights = BF16 * shape.parameters / split
    left = taken - weights - ENGINE
    rows = left * split / shape.cached(longest)
    enough = f"KV cache {left / GIB:.1f} for {rows:.0f} rows of {longest} tokens"
    if rows < 1:
        enough = f"NO ROOM for one row of {longest} tokens: raise gpu_memory_utilization or the tensor parallel size"
    return taken, f" (weights {weights / GIB:.1f}, {enough})"


def _host(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> str:
    """What rests on the host of one node, and one step's media."""
    model, data = config.actor_rollout_ref.model, config.data.embedrl
    shape, embedder = _shape(model.path), _shape(section.embedder.path)
    share = int(config.trainer.n_gpus_per_node) / batch.devices
    actor = _actor(config, batch)
    offloaded = max(actor.weights + actor.optimizer - actor.resting, 0)
    parts = {"actor": offloaded * int(config.trainer.n_gpus_per_node)}
    if config.actor_rollout_ref.actor.use_kl_loss:
        parts["reference"] = BF16 * shape.parameters * share
    if section.embedder.backend == "worker" and section.embedder.offload:
        size = (FP32 if section.embedder.train.enable else BF16) * embedder.parameters
        parts["Embedder"] = size + (2 * size if section.embedder.train.enable else 0)
    largest = max(int(data.image_max_tokens), int(data.frame_max_tokens) * (int(data.max_frames) // 2))
    row = shape.pixels(largest)
    rests = ", ".join(f"{label} {size / GIB:.0f}" for label, size in parts.items() if size > GIB / 2) or "nothing"
    return (
        f"a node, GiB at rest: {rests}; rows of a step with one picture or clip each: {batch.rows} x "
        f"{row / 1024**2:.0f} MiB = {batch.rows * row / GIB:.0f} (over all nodes)"
    )
