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
from embedrl_verl.config.batch import SEPARATE, BatchPlan, longest_row
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan.roles import (
    actor_memory,
    embedder_memory,
    has_reference,
    megatron_of,
    number,
    reference_pass,
    trained_parameters,
)
from embedrl_verl.platforms.footprint import BF16, FP32, Shape, shape_of

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
HERE = "training GPU"


@dataclass(frozen=True)
class Stage:
    """One stage on one kind of device.

    Attributes:
        device: "training GPU", "rollout GPU", "Embedder's GPU" or "judge's GPU".
        parts: label -> bytes, of which the stage is the sum.
        remedy: what to change when it does not fit.
        note: what else is worth knowing.
        short: why it cannot work whatever the sum; "" if it can.
    """

    name: str
    device: str
    parts: dict[str, float]
    remedy: str
    note: str = ""
    short: str = ""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    def line(self) -> str:
        parts = " + ".join(f"{label} {size / GIB:.1f}" for label, size in self.parts.items() if size > GIB / 20)
        return f"{self.name:<10} {self.total / GIB:>5.1f}  {self.device}: {parts}{self.note}"

    def warning(self, device_bytes: float) -> str:
        """Why it does not work on such a device; "" if it does."""
        if self.short:
            return f"{self.name} cannot work: {self.short}"
        if self.total <= USABLE * device_bytes:
            return ""
        return (
            f"{self.name} may need {self.total / GIB:.0f} of {device_bytes / GIB:.0f} GiB, which is above "
            f"{USABLE:.0%}: {self.remedy}"
        )


def memory_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> list[tuple[str, str]]:
    """The plan's lines; none on the CPU."""
    if str(config.trainer.device) == "cpu":
        return []
    reasoner, embedder = str(config.actor_rollout_ref.model.path), section.embedder.path
    if shape_of(reasoner) is None:
        return [("memory", f"not estimated: {_unreadable(reasoner)}")]
    total, source = device_memory()
    stages = memory_stages(config, batch, section, total)
    lines = [("memory", f"GPU of {total / GIB:.0f} GiB ({source}); at most, in GiB, without fragments (docs/gpu.md):")]
    lines += [("", stage.line()) for stage in stages]
    if section.embedder.backend == "worker" and shape_of(embedder) is None:
        lines.append(("", f"vectors: not estimated: {_unreadable(embedder)}"))
    warnings = [("warning", text) for stage in stages if (text := stage.warning(total))]
    largest = max(stage.total for stage in stages) / total
    lines += warnings or [("", f"fits: at most {largest:.0%} of a GPU")]
    if not config.actor_rollout_ref.model.use_remove_padding:
        lines.append(("", "rows are padded (attention=sdpa): short ones beside a long one take more than this"))
    values = {key: OmegaConf.select(config, key) for key in NOT_COUNTED}
    changed = [f"{key}={value}" for key, value in values.items() if value not in (None, NOT_COUNTED[key])]
    if changed:
        lines.append(("", f"not in these figures: {', '.join(changed)}"))
    return [*lines, ("host memory", _host(config, batch, section))]


def device_memory() -> tuple[float, str]:
    """Bytes of a GPU and where that is from: the variable GPU_MEMORY (GiB), a GPU of this machine, or 80 GiB."""
    import torch

    given = os.environ.get("GPU_MEMORY", "")
    if given:
        try:
            gib = float(given)
        except ValueError:
            gib = 0.0
        if not 0 < gib < math.inf:
            raise ConfigError(f"GPU_MEMORY must be the memory of one GPU in GiB, e.g. 80; got {given!r}")
        return gib * GIB, "GPU_MEMORY"
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "as here"
    return ASSUMED_GIB * GIB, "assumed; set GPU_MEMORY"


def memory_stages(config: Any, batch: BatchPlan, section: EmbedRLConfig, total: float) -> list[Stage]:
    """The stages of a step for devices of `total` bytes. The Reasoner must be known; stages of an Embedder that is not
    are left out."""
    roles, served = config.actor_rollout_ref, config.reward.reward_model
    shape, embedders = _shapes(config, section)
    actor, apart = actor_memory(config, batch, shape), section.embedder.n_gpus_per_node > 0
    separate, embeds_here = config.trainer.v1.trainer_mode == SEPARATE, section.embedder.backend == "worker"
    embedder = None if embedders is None else embedder_memory(config, batch, section.embedder, embedders)
    beside = 0.0 if apart or embedder is None else embedder.resting
    judged_here = served.enable and not served.enable_resource_pool
    # Processes with a context on a training GPU: the actor's, the Embedder's, and each engine's, asleep or not.
    here = CONTEXT * (1 + (embeds_here and not apart) + (not separate) + judged_here)
    shared = {"Embedder at rest": beside, "CUDA": here}
    asleep = {"at rest": actor.resting + beside, "CUDA": here}
    where = {"actor at rest": 0.0 if apart else actor.resting, "CUDA": CONTEXT if apart else here}
    place, offload = "Embedder's GPU" if apart else HERE, ", or set OFFLOAD=True" if actor.resting else ""

    def engine(name: str, section: str, model: str, longest: int, own: str, remedy: str) -> Stage:
        """vLLM on devices of its own (`own`), or on the training GPUs beside what rests there."""
        taken, note, short = _engine(config, section, model, total, longest)
        others = {"CUDA": CONTEXT} if own else asleep
        lower = f"lower {section}.gpu_memory_utilization"
        return Stage(name, own or HERE, {"vLLM": taken, **others}, lower + ("" if own else remedy), note, short)

    longest, reasoner = longest_row(config), str(roles.model.path)
    resting = ", or set OFFLOAD=True" if actor.resting + beside else ""
    own = "rollout GPU" if separate else ""
    stages = [engine("rollout", "actor_rollout_ref.rollout", reasoner, longest, own, resting)]
    if embedder is not None:
        parts = {"Embedder": embedder.weights + embedder.idle, "pass": embedder.forward, **where}
        stages.append(Stage("vectors", place, parts, "lower embedrl.embedder.max_tokens_per_gpu"))
    if served.enable:
        judged = int(served.rollout.prompt_length) + int(served.rollout.response_length)
        move = ", or give the judge GPUs of its own (JUDGE_GPUS_PER_NODE, fewer GPUS_PER_NODE)"
        own = "judge's GPU" if served.enable_resource_pool else ""
        stages.append(engine("judge", "reward.reward_model.rollout", str(served.model_path), judged, own, move))
    parts = {"weights": actor.weights, "Adam": actor.idle, "pass": actor.forward, **shared}
    lower = f"lower actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu{offload}"
    stages.append(Stage("log-probs", HERE, parts, lower))
    if has_reference(config):
        parts = {"pass": reference_pass(config, batch, shape), "actor at rest": actor.resting, **shared}
        lower = f"lower actor_rollout_ref.ref.log_prob_max_token_len_per_gpu{offload}"
        stages.append(Stage("reference", HERE, parts, lower))
    parts = {"weights": actor.weights, "Adam": actor.moments, "gradients and pass": actor.update, **shared}
    fewer = (
        f"more GPUs, or fewer tokens: actor_rollout_ref.actor.ppo_max_token_len_per_gpu is "
        f"{roles.actor.ppo_max_token_len_per_gpu} and must hold a row of {longest} (data.max_prompt_length + "
        "max_response_length)"
    )
    stages.append(Stage("update", HERE, parts, fewer))
    if section.embedder.train.enable and embedder is not None:
        parts = {"weights": embedder.weights, "Adam": embedder.moments, "gradients and pass": embedder.update, **where}
        lower = f"lower embedrl.embedder.train.max_tokens_per_gpu{'' if apart else offload}"
        stages.append(Stage("co-training", place, parts, lower))
    return stages


def _shapes(config: Any, section: EmbedRLConfig) -> tuple[Shape, Shape | None]:
    """The Reasoner's, and that of an Embedder on a worker, if it is known."""
    shape = shape_of(str(config.actor_rollout_ref.model.path))
    assert shape is not None  # `memory_lines` has looked
    return shape, shape_of(section.embedder.path) if section.embedder.backend == "worker" else None


def _unreadable(path: str) -> str:
    if Path(path).expanduser().exists():
        return f"{path} is no Qwen-VL model that transformers can make"
    return f"{path} is not here (a plan on the machine that has it knows more)"


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
    (shape, embedder), train = _shapes(config, section), section.embedder.train
    actor = actor_memory(config, batch, shape)
    parts = {"actor": gpus * (actor.weights * (not actor.keeps_weights) + actor.moments * (not actor.keeps_moments))}
    if has_reference(config):
        if str(roles.ref.strategy) == "megatron":
            parts["reference"] = gpus * megatron_of(roles.ref.megatron, shape, batch.devices, trained=False).weights
        else:
            parts["reference"] = FP32 * shape.parameters * gpus / batch.devices
    if embedder is not None:
        weight = FP32 if train.enable or section.embedder.dtype != "bfloat16" else BF16
        trained = trained_parameters(embedder, train)
        away = weight * embedder.parameters + 2 * FP32 * trained if section.embedder.offload else 0
        parts["Embedder"] = away + (FP32 * trained if train.ema_decay else 0)
    row = shape.pixels(max(data.image_max_tokens, data.frame_max_tokens * (data.max_frames // 2)))
    rests = ", ".join(f"{label} {size / GIB:.0f}" for label, size in parts.items() if size > GIB / 2) or "nothing"
    return (
        f"a node, GiB at rest: {rests}; rows of a step with one picture or clip each: {batch.rows} x "
        f"{row / 1024**2:.0f} MiB = {batch.rows * row / GIB:.0f} (over all nodes)"
    )
