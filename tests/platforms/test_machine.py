# SPDX-License-Identifier: Apache-2.0
"""What this machine gives its processes: memory, ports that stay free, GPUs that torch can use."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import machine, ports
from embedrl_verl.platforms.machine import driver_problem, machine_memory

V2, V1 = machine.GROUPS.values()


@pytest.mark.parametrize(
    ("names", "limit", "used", "reclaimable", "expected"),
    [
        (V2, "max", 500, 0, (800, 1000)),
        (V2, "300", 250, 100, (150, 300)),
        (V1, str(1 << 62), 500, 0, (800, 1000)),
        (V1, "400", 500, 50, (0, 400)),
        (V2, "900", 10, 0, (800, 900)),
    ],
)
def test_memory_is_the_machines_or_less_in_a_container(
    names, limit, used, reclaimable, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=800))
    monkeypatch.setattr(machine, "GROUPS", {tmp_path: names, tmp_path / "none": names})
    assert machine_memory() == (800, 1000)  # no control groups
    for name, text in zip(names, (limit, used, f"cache 7\n{names[2]} {reclaimable}"), strict=True):
        (tmp_path / ("memory.stat" if name == names[2] else name)).write_text(f"{text}\n")
    assert machine_memory() == expected


def test_here_it_is_no_more_than_the_machine_has():
    available, total = machine_memory()
    assert 0 < available <= total <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [
        ("550.54.15", "13.0", "driver must be 580 or newer for torch"),
        ("580.95.05", None, "is built for the CPU. pip install -r requirements/gpu.txt"),
        ("580.95.05", "13.0", "can use none: look at CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_torch_cannot_use_have_a_reason(driver, cuda, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    listed = SimpleNamespace(returncode=0, stdout=f"{driver}\n{driver}\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *arguments, **options: listed)
    assert message in driver_problem()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (32768, 60999, range(20000, 32768)),
        (15000, 40000, range(40001, 65536)),
        (1024, 65535, range(20000, 65536)),  # nothing is left: as good as the system's own
        (20500, 65000, range(20000, 65536)),
    ],
)
def test_ports_are_outside_the_range_of_the_system(low, high, expected, tmp_path, monkeypatch):
    (tmp_path / "range").write_text(f"{low}\t{high}\n")
    monkeypatch.setattr(ports, "_LINUX", tmp_path / "range")
    assert ports.ports_given_to_nobody() == expected
    for _ in range(100):
        some = ports.some_ports()
        assert some.stop == expected.stop and set(some) <= set(expected) and len(some) >= len(expected) // 2
    assert len({ports.some_ports().start for _ in range(100)}) > 90


def test_a_port_at_which_someone_listens_is_passed_over(monkeypatch):
    with socket.create_server(("127.0.0.1", ports.free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "some_ports", lambda: range(port, port + 50))
        assert port < ports.free_port() < port + 50
        monkeypatch.setattr(ports, "some_ports", lambda: range(port, port + 1))
        with pytest.raises(ResourceError, match=rf"no port from {port} to {port} is free on 127.0.0.1"):
            ports.free_port()
    with pytest.raises(OSError, match="assign"):
        ports.free_port("192.0.2.77")
