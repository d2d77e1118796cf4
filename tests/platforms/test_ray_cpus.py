# SPDX-License-Identifier: Apache-2.0
"""A run that Ray cannot place is refused before Ray starts, with what is missing."""

import pytest
import ray
from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms.ray_cpus import Node, check_ray_cpus, ray_needs

BASE = """
trainer: {nnodes: 1, n_gpus_per_node: 1}
reward: {reward_model: {enable_resource_pool: false, nnodes: 1, n_gpus_per_node: 2}}
transfer_queue: {backend: {storage_backend: SimpleStorage, SimpleStorage: {num_data_storage_units: 1}}}
ray_kwargs: {ray_init: {num_cpus: null}}
actor_rollout_ref: {rollout: {nnodes: 1, n_gpus_per_node: 2}}
"""
EMBEDDER = "embedrl.embedder="


def config(*changes: str, **ray_init):
    """The keys of verl's config that Ray's placement depends on."""
    base = OmegaConf.create({**OmegaConf.create(BASE), "ray_kwargs": {"ray_init": {"num_cpus": None, **ray_init}}})
    for change in changes:
        key, value = change.split("=", 1)
        OmegaConf.update(base, key, OmegaConf.create(f"x: {value}").x, force_add=True)
    return base


UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units="
DEVICES = "trainer.n_gpus_per_node="


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "what"),
    [
        ([], 5, 1, "3 for each of 1 devices"),
        ([f"{DEVICES}2"], 8, 2, "3 for each of 2 devices"),
        ([f"{UNITS}8"], 12, 1, "8 storage units"),
        ([f"{UNITS}8", "transfer_queue.backend.storage_backend=MooncakeStore"], 4, 1, "0 storage units"),
        (["trainer.nnodes=4", f"{DEVICES}8", f"{UNITS}8"], 105, 32, "each of 32 devices"),
        (["reward.reward_model.enable_resource_pool=true"], 11, 3, "each of 3 devices"),
        ([EMBEDDER + "{backend: worker, nnodes: 1, n_gpus_per_node: 2}"], 11, 3, "each of 3 devices"),
        ([EMBEDDER + "{backend: worker, nnodes: 1, n_gpus_per_node: 0}"], 5, 1, "1 storage units\\)"),
        ([EMBEDDER + "{backend: sentence_transformers, sentence: {n_gpus: 1}}"], 6, 2, "1 sentence-transformers proc"),
        ([EMBEDDER + "{backend: server, server: {servers: 3, n_gpus_per_server: 2}}"], 8, 7, "3 embedding servers"),
        ([EMBEDDER + "{backend: server, server: {urls: [http://a], servers: 3}}"], 5, 1, "1 storage units\\)"),
        (["trainer.v1.trainer_mode=egrl_separate_async"], 9, 3, "4 rollouts"),
    ],
)
def test_needs_add_up_and_one_cpu_less_is_refused(changes, cpus, gpus, what):
    run = config(*changes)
    assert ray_needs(run)[:2] == (cpus, gpus)
    per_node = [Node(cpus, gpus)] * 4  # a pool wants whole nodes
    with pytest.raises(ResourceError, match=rf"needs {cpus} CPUs.*{what}.*Ray has {cpus - 1} CPUs.*num_cpus={cpus}"):
        check_ray_cpus(run, [Node(cpus - 1, gpus)])
    check_ray_cpus(run, per_node)


def test_the_local_machine_is_refused_before_ray_starts():
    """verl's defaults on two cores: 8 storage units, Ray's own CPU count."""
    with pytest.raises(ResourceError, match=r"needs 12 CPUs .*8 storage units.*Ray has 2 CPUs"):
        check_ray_cpus(config(f"{UNITS}8", num_cpus=2, num_gpus=1))
    check_ray_cpus(config(num_cpus=5, num_gpus=1))
    assert not ray.is_initialized()


def test_a_joined_cluster_is_asked_for_its_nodes(monkeypatch):
    alive = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}])
    with pytest.raises(ResourceError, match="Ray has 4 CPUs and 1 GPU slots on 1 node"):
        check_ray_cpus(config(num_cpus=99))


def test_missing_gpu_slots_name_the_key_of_the_cpu_platform():
    with pytest.raises(ResourceError, match=r"1 GPU slots too few.*\+ray_kwargs\.ray_init\.num_gpus=1"):
        check_ray_cpus(config(), [Node(16, 0)])


def test_a_pool_needs_whole_nodes():
    """Enough in all, but no node that holds a pool of 8 devices."""
    run = config("trainer.nnodes=2", f"{DEVICES}8")
    with pytest.raises(ResourceError, match=r"2 node\(s\) with 8 GPU slots and 24 CPUs each; 0 of 4"):
        check_ray_cpus(run, [Node(64, 4)] * 4)
    check_ray_cpus(run, [Node(64, 8)] * 2)
