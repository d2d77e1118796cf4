# SPDX-License-Identifier: Apache-2.0
"""What this machine gives its processes: memory, ports that stay free, GPUs that torch can use."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import machine, ports
from embedrl_verl.platforms.machine import driver_problem, machine_memory

HUGE = 1 << 62
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """`groups(own, {folder: (limit, used, inactive)}, names)`: a machine with 1000 bytes, of which 800 are free."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=800))
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")

    def make(own, limits, names):
        (tmp_path / "own").write_text(own)
        for folder, (limit, used, inactive) in limits.items():
            path = tmp_path / "groups" / folder
            path.mkdir(parents=True, exist_ok=True)
            (path / names[0]).write_text(f"{limit}\n")
            (path / names[1]).write_text(f"{used}\n")
            (path / "memory.stat").write_text(f"cache 7\n{names[2]} {inactive}\n")
        return machine_memory()

    return make


def test_without_a_limit_it_is_the_machines_memory(groups):
    assert machine_memory() == (800, 1000)  # no control groups
    assert groups("0::/\n", {".": ("max", 500, 0)}, V2) == (800, 1000)
    assert groups("4:memory:/\n0::/\n", {"memory": (HUGE, 500, 0)}, V1) == (800, 1000)


def test_a_containers_limit_is_its_memory_and_pages_of_files_can_be_given_back(groups):
    assert groups("0::/\n", {".": (300, 250, 100)}, V2) == (150, 300)


def test_the_lowest_limit_on_the_way_to_a_jobs_group_holds(groups):
    limits = {"slurm/job_1/step_0": ("max", 20, 0), "slurm/job_1": (600, 100, 0), "slurm": (900, 850, 0)}
    assert groups("0::/slurm/job_1/step_0\n", limits, V2) == (50, 600)
    assert groups("0::/other\n", {}, V2) == (800, 1000)


def test_a_container_that_is_told_the_hosts_path_has_its_limit_at_the_root(groups):
    own = "5:devices:/docker/1f\n4:cpu,memory:/docker/1f\n0::/\n"
    assert groups(own, {"memory": (400, 500, 0)}, V1) == (0, 400)


def test_the_group_of_another_is_none_of_ours(groups):
    assert groups("0::/a\n", {"b": (10, 5, 0)}, V2) == (800, 1000)


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
