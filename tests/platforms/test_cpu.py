# SPDX-License-Identifier: Apache-2.0
"""verl's device interface on a CPU."""

import torch
from verl.plugin.platform import platform_manager

from embedrl_verl.platforms.cpu import CpuDevice, CpuDeviceIndex, CpuPlatform


def test_the_current_device_is_a_torch_device_and_an_index():
    device = CpuPlatform().current_device()
    assert torch.zeros(2).to(device).device.type == "cpu"
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.device(device) == torch.device("cpu")
    assert f"cpu:{device}" == "cpu:0"


def test_auto_detection_never_chooses_it(monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert platform_manager._detect_platform_name() != "cpu"
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert platform_manager._detect_platform_name() == "cpu"


def test_random_state_is_restored():
    state = CpuDevice.get_rng_state()
    first = torch.rand(3)
    CpuDevice.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    CpuPlatform().manual_seed(3)
    first = torch.rand(3)
    CpuPlatform().manual_seed_all(3)
    assert torch.equal(torch.rand(3), first)


def test_memory_figures_are_bytes_of_this_process_and_machine():
    free, total = CpuDevice.mem_get_info()
    assert 0 < free < total
    # The kernel adds up its counters in batches, so the peak can lag by some pages.
    assert 10 * 2**20 < CpuDevice.memory_allocated() <= 1.01 * CpuDevice.max_memory_allocated() < total


def test_nothing_of_the_interface_is_left_open():
    assert CpuPlatform.__abstractmethods__ == frozenset()


def test_index_formats_like_the_integer_zero():
    assert f"{CpuDeviceIndex():02d}" == "00"
