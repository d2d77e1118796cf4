# SPDX-License-Identifier: Apache-2.0
"""Chosen ports are free, and are none that the system gives to whoever asks for any; so are those of verl's ranks."""

import inspect
import socket

import pytest
import verl
from verl.single_controller.ray import RayWorkerGroup
from verl.trainer.ppo.v1 import trainer_base

from embedrl_verl.errors import PluginError, ResourceError
from embedrl_verl.platforms import ports
from embedrl_verl.platforms.patches import choose_master_ports_that_stay_free


@pytest.fixture
def system_gives(tmp_path, monkeypatch):
    def set_range(low, high):
        (tmp_path / "range").write_text(f"{low}\t{high}\n")
        monkeypatch.setattr(ports, "_LINUX", tmp_path / "range")

    return set_range


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (32768, 60999, range(20000, 32768)),
        (15000, 40000, range(40001, 65536)),
        (1024, 65535, range(20000, 65536)),  # nothing is left: as good as the system's own
        (20500, 65000, range(20000, 65536)),
    ],
)
def test_ports_are_outside_the_range_of_the_system(system_gives, low, high, expected):
    system_gives(low, high)
    assert ports.ports_given_to_nobody() == expected
    for _ in range(100):
        some = ports.some_ports()
        assert some.stop == expected.stop and set(some) <= set(expected) and len(some) >= len(expected) // 2
    assert len({ports.some_ports().start for _ in range(100)}) > 90


def test_on_another_system_they_are_outside_the_range_of_iana(tmp_path, monkeypatch):
    monkeypatch.setattr(ports, "_LINUX", tmp_path / "no such file")
    assert ports.ports_given_to_nobody() == range(20000, 49152)


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


@pytest.fixture
def asked(monkeypatch):
    """The ranges that a patched worker group asks verl to choose from."""
    seen = []

    def _get_master_addr_port(self, pg, bundle_index=0, master_port_range=None):
        seen.append(master_port_range)

    monkeypatch.setattr(RayWorkerGroup, "_get_master_addr_port", _get_master_addr_port)
    choose_master_ports_that_stay_free()
    choose_master_ports_that_stay_free()
    return seen


def test_ranks_of_a_worker_group_meet_outside_the_range_of_the_system(asked, system_gives):
    system_gives(32768, 60999)
    group = object.__new__(RayWorkerGroup)
    group._get_master_addr_port("pg", bundle_index=0, master_port_range=None)
    group._get_master_addr_port("pg", master_port_range=[40000, 40010])
    [(first, stop), given] = asked
    assert 20000 <= first < 32768 == stop and given == [40000, 40010]


def test_upstreams_trainers_still_pass_no_range_on():
    """The day they do (or verl keeps the port), this fails and the patch can go."""
    assert "master_port_range" not in inspect.getsource(trainer_base)
    assert 's.bind(("", 0))' in inspect.getsource(inspect.getmodule(RayWorkerGroup))


def test_trainers_are_patched_and_another_verl_is_refused(monkeypatch):
    """Importing verl's trainers, as above, is what the plugin waits for."""
    assert RayWorkerGroup._get_master_addr_port.__module__ == choose_master_ports_that_stay_free.__module__
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(PluginError, match="choose_master_ports_that_stay_free is written for verl"):
        choose_master_ports_that_stay_free()
