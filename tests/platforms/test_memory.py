# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import psutil
import pytest

from embedrl_verl.platforms import memory
from embedrl_verl.platforms.memory import machine_memory

HUGE = 1 << 62
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """`groups(own, {folder: (limit, used, inactive)}, names)`: a machine with 1000 bytes, of which 800 are free."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=800))
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")

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
    assert memory.machine_memory() == (800, 1000)  # no control groups
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
