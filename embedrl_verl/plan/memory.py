# SPDX-License-Identifier: Apache-2.0
"""What a plan says of memory: the most that each stage of a step takes on a device, and what rests on the host.

Every figure is a bound for full micro-batches of packed rows whose prompts are pictures throughout; real rows take
less. Not in them: what the allocator cannot use. `platforms.footprint` has the formulas and what they were compared
with.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan.batch import BatchPlan
from embedrl_verl.plan.roles import (
    RoleMemory,
    actor_memory,
    embedder_memory,
    embeds_here,
    has_reference,
    known_shape,
    megatron_of,
    number,
    reference_pass,
    trained_parameters,
)
from embedrl_verl.platforms.footprint import BF16, FP32, shape_of
from embedrl_verl.trainer.checks import longest_row
from embedrl_verl.trainer.checks_async import SEPARATE

GIB = 1024**3
ASSUMED_GIB = 80
CONTEXT = int(1.5 * GIB)
"""CUDA and NCCL of one process (assumed, not measured by us)."""
ENGINE = int(2.5 * GIB)
"""What vLLM keeps beside weights and KV cache: activations of its largest batch and CUDA graphs (assumed)."""
USABLE = 0.9
"""Of a device's memory: the rest goes to fragments and to what the estimates miss."""
NOT_COUNTED = {
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward": True,
    "actor_rollout_ref.actor.fsdp_config.offload_policy": False,
    "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation": False,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": None,
    "actor_rollout_ref.model.enable_activation_offload": False,
    "actor_rollout_ref.rollout.free_cache_engine": True,
}
"""Settings that change the figures and are taken at these values."""


@dataclass(frozen=True)
class Stage:
    """One stage on one kind of device.

    Attributes:
        name: of the stage.
        device: "training GPU", "rollout GPU", "Embedder's GPU" or "judge's GPU".
        parts: label -> bytes, of which the stage is the sum.
        note: what else is worth knowing.
        short: why it cannot work whatever the sum; "" if it can.
        remedy: what to change when it does not fit.
    """

    name: str
    device: str
    parts: dict[str, float]
    note: str = ""
    short: str = ""
    remedy: str = ""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def memory_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> list[tuple[str, str]]:
    """The plan's lines; none on the CPU.

    Raises:
        ConfigError: GPU_MEMORY is no positive number, or a key that is asked for is null.
    """
    if str(config.trainer.device) == "cpu":
        return []
    reasoner = str(config.actor_rollout_ref.model.path)
    if shape_of(reasoner) is None:
        return [("memory", f"not estimated: {_unreadable(reasoner)}")]
    total, source = device_memory()
    lines = [
        ("memory", f"GPU of {total / GIB:.0f} GiB ({source}); at most, in GiB, without fragments (docs/gpu.md):"),
    ]
    stages = memory_stages(config, batch, section, total)
    for stage in stages:
        parts = " + ".join(f"{label} {size / GIB:.1f}" for label, size in stage.parts.items() if size > GIB / 20)
        lines.append(("", f"{stage.name:<10} {stage.total / GIB:>5.1f}  {stage.device}: {parts}{stage.note}"))
    if embeds_here(section) and shape_of(str(section.embedder.path)) is None:
        lines.append(("", f"vectors: not estimated: {_unreadable(str(section.embedder.path))}"))
    warnings = []
    for stage in stages:
        if stage.short:
            warnings.append(f"{stage.name} cannot work: {stage.short}")
        elif stage.total > USABLE * total:
            warnings.append(
                f"{stage.name} may need {stage.total / GIB:.0f} of {total / GIB:.0f} GiB, which is above {USABLE:.0%}: "
                f"{stage.remedy}"
            )
    lines += [("warning", text) for text in warnings]
    if not warnings:
        largest = max(stage.total for stage in stages) / total
        lines.append(("", f"fits: at most {largest:.0%} of a GPU"))
    if not config.actor_rollout_ref.model.use_remove_padding:
        lines.append(("", "rows are padded (attention=sdpa): short ones beside a long one take more than this"))
    changed = [f"{key}={OmegaConf.select(config, key)}" for key in NOT_COUNTED if _is_changed(config, key)]
    if changed:
        lines.append(("", f"not in these figures: {', '.join(changed)}"))
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


def memory_stages(config: Any, batch: BatchPlan, section: EmbedRLConfig, total: float) -> list[Stage]:
    """The stages of a step for devices of `total` bytes. The Reasoner must be known; stages of an Embedder that is not
    are left out."""
    roles, train = config.actor_rollout_ref, section.embedder.train
    actor = actor_memory(config, batch)
    embedder = None
    if embeds_here(section) and shape_of(str(section.embedder.path)) is not None:
        embedder = embedder_memory(config, batch, section)
    apart = section.embedder.n_gpus_per_node > 0
    beside = 0.0 if apart or embedder is None else embedder.resting
    rest = 0.0 if apart else actor.resting
    judged_here = config.reward.reward_model.enable and not config.reward.reward_model.enable_resource_pool
    separate = config.trainer.v1.trainer_mode == SEPARATE
    # Processes with a context on a training GPU: the actor's, the Embedder's, and each engine's, asleep or not.
    here = CONTEXT * (1 + (embeds_here(section) and not apart) + (not separate) + judged_here)
    shared = {"Embedder at rest": beside, "CUDA": here}
    where = {"actor at rest": rest, "CUDA": CONTEXT if apart else here}
    place = "Embedder's GPU" if apart else "training GPU"

    stages = [_rollout(config, total, resting=actor.resting + beside, context=here)]
    if embedder is not None:
        parts = {"Embedder": embedder.weights + embedder.idle, "pass": embedder.forward, **where}
        stages.append(Stage("vectors", place, parts, remedy="lower embedrl.embedder.max_tokens_per_gpu"))
    stages += _judge(config, total, resting=actor.resting + beside, context=here)
    parts = {"weights": actor.weights, "Adam": actor.idle, "pass": actor.forward, **shared}
    tokens = "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"
    stages.append(Stage("log-probs", "training GPU", parts, remedy=f"lower {tokens}{_offload_too(actor)}"))
    if has_reference(config):
        parts = {"pass": reference_pass(config, batch), "actor at rest": actor.resting, **shared}
        tokens = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
        stages.append(Stage("reference", "training GPU", parts, remedy=f"lower {tokens}{_offload_too(actor)}"))
    parts = {"weights": actor.weights, "Adam": actor.moments, "gradients and pass": actor.update, **shared}
    longest = longest_row(config)
    remedy = (
        f"more GPUs, or fewer tokens: actor_rollout_ref.actor.ppo_max_token_len_per_gpu is "
        f"{roles.actor.ppo_max_token_len_per_gpu} and must hold a row of {longest} (data.max_prompt_length + "
        "max_response_length)"
    )
    stages.append(Stage("update", "training GPU", parts, remedy=remedy))
    if train.enable and embedder is not None:
        parts = {"weights": embedder.weights, "Adam": embedder.moments, "gradients and pass": embedder.update}
        remedy = f"lower embedrl.embedder.train.max_tokens_per_gpu{'' if apart else _offload_too(actor)}"
        stages.append(Stage("co-training", place, {**parts, **where}, remedy=remedy))
    return stages


def _offload_too(actor: RoleMemory) -> str:
    return ", or set OFFLOAD=True" if actor.resting else ""


def _unreadable(path: str) -> str:
    if Path(path).expanduser().exists():
        return f"{path} is no Qwen-VL model that transformers can make"
    return f"{path} is not here (a plan on the machine that has it knows more)"


def _is_changed(config: Any, key: str) -> bool:
    value = OmegaConf.select(config, key)
    return value is not None and value != NOT_COUNTED[key]


def _rollout(config: Any, total: float, *, resting: float, context: float) -> Stage:
    name = "actor_rollout_ref.rollout"
    engine, note, short = _engine(config, name, str(config.actor_rollout_ref.model.path), total, longest_row(config))
    if config.trainer.v1.trainer_mode == SEPARATE:
        return Stage("rollout", "rollout GPU", {"vLLM": engine, "CUDA": CONTEXT}, note, short, _lower(name))
    parts = {"vLLM": engine, "at rest": resting, "CUDA": context}
    remedy = _lower(name) + (", or set OFFLOAD=True" if resting else "")
    return Stage("rollout", "training GPU", parts, note, short, remedy)


def _judge(config: Any, total: float, *, resting: float, context: float) -> list[Stage]:
    served, name = config.reward.reward_model, "reward.reward_model.rollout"
    if not served.enable:
        return []
    longest = int(served.rollout.prompt_length) + int(served.rollout.response_length)
    engine, note, short = _engine(config, name, str(served.model_path), total, longest)
    if served.enable_resource_pool:
        return [Stage("judge", "judge's GPU", {"vLLM": engine, "CUDA": CONTEXT}, note, short, _lower(name))]
    parts = {"vLLM": engine, "at rest": resting, "CUDA": context}
    remedy = f"{_lower(name)}, or give the judge GPUs of its own (JUDGE_GPUS_PER_NODE, fewer GPUS_PER_NODE)"
    return [Stage("judge", "training GPU", parts, note, short, remedy)]


def _lower(name: str) -> str:
    return f"lower {name}.gpu_memory_utilization"


def _engine(config: Any, name: str, path: str, total: float, longest: int) -> tuple[float, str, str]:
    """Bytes of a vLLM engine, what they are used for, and why they do not suffice ("" if they do)."""
    rollout = OmegaConf.select(config, name)
    taken = number(rollout, "gpu_memory_utilization", name) * total
    shape = shape_of(path)
    if shape is None:
        return taken, f" ({_unreadable(path)})", ""
    split = int(rollout.tensor_model_parallel_size)
    weights = BF16 * shape.parameters / split
    left = taken - weights - ENGINE
    rows = left * split / max(shape.cached(longest), 1)
    if rows < 1:
        short = (
            f"{max(left, 0) / GIB:.1f} GiB are left for the KV cache, and a row of {longest} tokens needs "
            f"{shape.cached(longest) / split / GIB:.1f}: raise {name}.gpu_memory_utilization or "
            "tensor_model_parallel_size"
        )
        return taken, f" (weights {weights / GIB:.1f}, no room for a row)", short
    note = f" (weights {weights / GIB:.1f}, KV cache {left / GIB:.1f} for {rows:.0f} rows of {longest} tokens)"
    return taken, note, ""


def _host(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> str:
    """What rests on the host of one node, and one step's media."""
    roles, data, gpus = config.actor_rollout_ref, config.data.embedrl, int(config.trainer.n_gpus_per_node)
    shape, actor, train = known_shape(roles.model.path), actor_memory(config, batch), section.embedder.train
    away = actor.weights * (not actor.keeps_weights) + actor.moments * (not actor.keeps_moments)
    parts = {"actor": away * gpus}
    if has_reference(config):
        if str(roles.ref.strategy) == "megatron":
            parts["reference"] = gpus * megatron_of(roles.ref.megatron, shape, batch.devices, trained=False).weights
        else:
            parts["reference"] = FP32 * shape.parameters * gpus / batch.devices
    embedder = shape_of(str(section.embedder.path))
    if embeds_here(section) and embedder is not None:
        weight = FP32 if train.enable or section.embedder.dtype != "bfloat16" else BF16
        trained = trained_parameters(embedder, section)
        away = weight * embedder.parameters + 2 * FP32 * trained if section.embedder.offload else 0
        parts["Embedder"] = away + (FP32 * trained if train.ema_decay else 0)
    largest = max(int(data.image_max_tokens), int(data.frame_max_tokens) * (int(data.max_frames) // 2))
    row = shape.pixels(largest)
    rests = ", ".join(f"{label} {size / GIB:.0f}" for label, size in parts.items() if size > GIB / 2) or "nothing"
    return (
        f"a node, GiB at rest: {rests}; rows of a step with one picture or clip each: {batch.rows} x "
        f"{row / 1024**2:.0f} MiB = {batch.rows * row / GIB:.0f} (over all nodes)"
    )
