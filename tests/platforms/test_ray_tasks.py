# SPDX-License-Identifier: Apache-2.0
"""Tasks on two Ray nodes: each once, whoever dies; what cannot be done is an error of its own kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedrl_verl.errors import ConfigError, DataError, ResourceError
from embedrl_verl.platforms import ray_tasks
from embedrl_verl.platforms.cluster import Cluster
from embedrl_verl.platforms.ray_tasks import TRIES, RayTasks, joined


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.fixture
def nodes(monkeypatch):
    """Nodes of a cluster that is not there."""
    monkeypatch.setattr(ray_tasks.ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray_tasks, "refuse_silent", lambda _: None)
    return lambda *found: monkeypatch.setattr(ray_tasks.ray, "nodes", lambda: list(found))


def test_a_worker_on_cuda_asks_for_a_gpu_and_there_is_one_for_each(nodes):
    nodes(node(8, 4), node(2, 4), node(64), node(8, 8, alive=False))
    for asked, device, gpus, workers in (("auto", "cuda", 1, 6), ("cuda", "cuda", 1, 6), ("cpu", "cpu", 0, 3)):
        with joined(Cluster("a:1"), asked, []) as tasks:
            assert (tasks.device, tasks.workers) == (device, workers)
            assert tasks.request() == {"num_cpus": 1, "num_gpus": gpus}
    with joined(Cluster("a:1", 2), "auto", []) as tasks:
        assert tasks.workers == 2


def test_a_cluster_without_room_for_a_worker_is_refused(nodes):
    nodes(node(8), node(0, 4))
    with pytest.raises(ResourceError, match=r"a CPU and a GPU \(--device cuda\); the nodes have {'CPU': 8}"):
        joined(Cluster("a:1"), "cuda", []).__enter__()
    with pytest.raises(ConfigError, match="got cuda:1"):
        joined(Cluster("a:1"), "cuda:1", []).__enter__()
    with joined(Cluster("a:1"), "auto", []) as tasks:
        assert tasks.device == "cpu"


def test_a_cluster_that_is_not_there_is_told():
    with pytest.raises(ResourceError, match=r"must answer within .* s; got"):
        joined(Cluster("127.0.0.1:1"), "cpu", []).__enter__()


@pytest.mark.e2e
@pytest.mark.slow
def test_tasks_of_the_dead_are_done_by_others_and_errors_keep_their_kind(two_nodes, tmp_path):
    def work(folder: Path, task: str) -> tuple[str, int]:
        """Dies of "die" once, of "fatal" always."""
        with (folder / task).open("a") as file:
            file.write("x")
        if task == "fatal" or (task == "die" and (folder / task).stat().st_size == 1):
            os._exit(1)
        if task == "bad":
            raise DataError("bad row")
        return task, os.getpid()

    def run(*tasks: str, must_see: tuple[Path, ...] = ()) -> dict[str, int]:
        found = RayTasks(2, "cpu", must_see).run(work, tmp_path, iter(tasks), 2)
        return dict(found)

    names = ["a", "b", "die", "c", "d"]
    with joined(Cluster(two_nodes.address), "cpu", []) as tasks:
        assert tasks.workers == 2 and ray_tasks.room("cpu") == 2
        assert sorted(run(*names)) == sorted(names)
        assert [(tmp_path / name).stat().st_size for name in names] == [1, 1, 2, 1, 1]
        with pytest.raises(ResourceError, match=f"{TRIES} workers have died of one task"):
            run("fatal")
        assert (tmp_path / "fatal").stat().st_size == TRIES
        with pytest.raises(DataError, match="^bad row$"):
            run("a", "bad")
        with pytest.raises(ConfigError, match="every node must have .*gone"):
            run("a", must_see=(tmp_path / "gone",))
        assert run() == {}
