# SPDX-License-Identifier: Apache-2.0
"""The platform `cpu` for verl's PlatformRegistry: real engines on a machine without an accelerator.

Chosen only by `VERL_PLATFORM=cpu`; auto-detection never picks it, so a GPU node with a broken driver fails instead of
training on its CPUs. Ray counts "GPU" slots for it (`+ray_kwargs.ray_init.num_gpus=N`), because verl's resource check
knows no other name; N is the number of data-parallel ranks. Memory figures are resident bytes of this process.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from embedrl_verl.platforms.memory import machine_memory

PLATFORM_NAME = "cpu"


class CpuDeviceIndex(str):
    """What `current_device()` returns: a torch device ("cpu") that prints as an index in `f"{device}:{index}"`; verl
    uses it both ways.
    """

    def __new__(cls) -> "CpuDeviceIndex":
        return super().__new__(cls, "cpu")

    def __format__(self, format_spec: str) -> str:
        return format(0, format_spec)


class CpuDevice:
    """Stands where verl expects `torch.cuda`: random state, memory figures in bytes, and no-ops for streams and
    caches.

    `is_available()` is False, as for any accelerator module on a machine without one: verl then skips its
    memory-fraction calls.
    """

    @staticmethod
    def is_available() -> bool:
        """No accelerator memory to manage."""
        return False

    @staticmethod
    def device_count() -> int:
        """One device, the host."""
        return 1

    @staticmethod
    def current_device() -> CpuDeviceIndex:
        """See CpuDeviceIndex."""
        return CpuDeviceIndex()

    @staticmethod
    def set_device(device: object) -> None:
        """Nothing to select."""

    @staticmethod
    def get_device_name(device: object = None) -> str:
        """Key of verl's table of peak operations per second."""
        return "CPU"

    @staticmethod
    def synchronize(device: object = None) -> None:
        """CPU operations are synchronous."""

    @staticmethod
    def empty_cache() -> None:
        """No caching allocator."""

    @staticmethod
    def ipc_collect() -> None:
        """No IPC handles."""

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        """Resident bytes of this process."""
        return psutil.Process().memory_info().rss

    @staticmethod
    def memory_reserved(device: object = None) -> int:
        """Resident bytes of this process."""
        return psutil.Process().memory_info().rss

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        """Largest resident bytes of this process so far (getrusage counts KiB on Linux)."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @staticmethod
    def max_memory_reserved(device: object = None) -> int:
        """Largest resident bytes of this process so far."""
        return CpuDevice.max_memory_allocated()

    @staticmethod
    def reset_peak_memory_stats(device: object = None) -> None:
        """The kernel's high-water mark cannot be reset."""

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        """(free, total) bytes of the machine or container."""
        return machine_memory()

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Seeds torch's CPU generator."""
        torch.manual_seed(seed)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Seeds torch's CPU generator."""
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        """State of torch's CPU generator, uint8 (n,)."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        """Restores torch's CPU generator."""
        torch.set_rng_state(state)


@PlatformRegistry.register(platform=PLATFORM_NAME)
class CpuPlatform(PlatformBase):
    """verl's device interface on a CPU; collectives by gloo, weights to vLLM through shared memory."""

    @property
    def device_name(self) -> str:
        """torch device type."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """Vendor key of verl's engine registry; engines are registered without one."""
        return "generic"

    @property
    def device_module(self) -> type[CpuDevice]:  # type: ignore[override]  # verl only reads attributes of it
        """Namespace that stands for `torch.cuda`."""
        return CpuDevice

    def is_available(self) -> bool:
        """A CPU is always there."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """False: never chosen by auto-detection."""
        return False

    def current_device(self) -> int:
        """See CpuDeviceIndex."""
        return CpuDeviceIndex()  # type: ignore[return-value]  # used by verl as device and as index

    def device_count(self) -> int:
        """One device, the host."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to select."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU operations are synchronous."""

    def manual_seed(self, seed: int) -> None:
        """Seeds torch's CPU generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seeds torch's CPU generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """No caching allocator."""

    def empty_cache(self) -> None:
        """No caching allocator."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """A CPU has no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """torch.distributed backend."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable Ray sets for its resource "GPU"."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler ranges."""
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        """verl's pool check counts only "GPU" and "NPU", and Ray gives accelerator ids to built-in names only."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Ray must not change CUDA_VISIBLE_DEVICES in the rollout servers."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """Weights go to vLLM through shared memory."""
        return False

    def cudart(self) -> None:
        """No CUDA runtime."""
        return None
