# SPDX-License-Identifier: Apache-2.0
"""A run that Ray cannot place is refused before Ray starts, with what is missing."""

import pytest
import ray
from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import ray_cpus
from embedrl_verl.platforms.ray_cpus import NodeResources, _refuse_busy, check_ray_cpus, ray_needs


def config(nnodes=1, devices=1, units=1, judge=None, **ray_init):
    """The keys of verl's config that Ray's placement depends on."""
    judge_nodes, judge_devices = judge or (0, 0)
    return OmegaConf.create(
        {
            "trainer": {"nnodes": nnodes, "n_gpus_per_node": devices},
            "reward": {
                "reward_model": {
                    "enable_resource_pool": judge is not None,
                    "nnodes": judge_nodes,
                    "n_gpus_per_node": judge_devices,
                }
            },
            "transfer_queue": {
                "backend": {
                    "storage_backend": "SimpleStorage",
                    "SimpleStorage": {"num_data_storage_units": units},
                }
            },
            "ray_kwargs": {"ray_init": {"num_cpus": None, **ray_init}},
        }
    )


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus"),
    [
        ({}, 5, 1),
        ({"devices": 2}, 8, 2),
        ({"units": 8}, 12, 1),
        ({"nnodes": 4, "devices": 8, "units": 8}, 105, 32),
        ({"judge": (1, 2)}, 11, 3),
    ],
)
def test_needs_add_up(settings, cpus, gpus):
    needs = ray_needs(config(**settings))
    assert (needs.cpus, needs.gpus) == (cpus, gpus)


def test_storage_units_count_for_simple_storage_only():
    other = config(units=8)
    other.transfer_queue.backend.storage_backend = "MooncakeStore"
    assert ray_needs(other).cpus == 4


@pytest.mark.parametrize(
    ("change", "cpus", "gpus", "what"),
    [
        ("embedder={backend: worker, nnodes: 1, n_gpus_per_node: 2}", 11, 3, "3 for each of 3 devices"),
        ("embedder={backend: worker, nnodes: 1, n_gpus_per_node: 0}", 5, 1, "1 storage units\\)"),
        ("embedder={backend: sentence_transformers, sentence: {n_gpus: 1}}", 6, 2, "1 sentence-transformers process"),
        ("embedder={backend: server, server: {servers: 3, n_gpus_per_server: 2}}", 8, 7, "3 embedding servers"),
        ("embedder={backend: server, server: {urls: [http://a], servers: 3}}", 5, 1, "1 storage units\\)"),
        ("mode=egrl_separate_async", 9, 3, "4 rollouts"),
    ],
)
def test_what_this_package_adds_counts_too(change, cpus, gpus, what):
    name, value = change.split("=", 1)
    run = config()
    if name == "embedder":
        run.embedrl = {"embedder": OmegaConf.create(value)}
    else:
        run.trainer.v1 = {"trainer_mode": value}
        run.actor_rollout_ref = {"rollout": {"nnodes": 1, "n_gpus_per_node": 2}}
    needs = ray_needs(run)
    assert (needs.cpus, needs.gpus) == (cpus, gpus)
    with pytest.raises(ResourceError, match=rf"needs {cpus} CPUs.*{what}.*Ray has {cpus - 1} CPUs"):
        check_ray_cpus(run, [NodeResources(cpus - 1, gpus)])
    check_ray_cpus(run, [NodeResources(cpus, gpus)])


def test_a_cluster_where_another_run_is_at_work_is_refused(monkeypatch):
    """Its TransferQueue would be shared."""
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: object())
    with pytest.raises(ResourceError, match="another run is at work in the Ray cluster at here:1"):
        _refuse_busy("here:1")


def test_exactly_enough_passes_and_one_less_does_not():
    check_ray_cpus(config(), [NodeResources(5, 1)])
    with pytest.raises(ResourceError, match=r"needs 5 CPUs.*Ray has 4 CPUs.*1 CPUs too few.*num_cpus=5"):
        check_ray_cpus(config(), [NodeResources(4, 1)])


def test_the_local_machine_is_refused_before_ray_starts():
    """verl's defaults on two cores: 8 storage units, Ray's own CPU count."""
    with pytest.raises(ResourceError, match=r"needs 12 CPUs .*8 storage units.*Ray has 2 CPUs"):
        check_ray_cpus(config(units=8, address="local", num_cpus=2, num_gpus=1))
    assert not ray.is_initialized()


def test_missing_gpu_slots_name_the_key_of_the_cpu_platform():
    with pytest.raises(ResourceError, match=r"1 GPU slots too few.*\+ray_kwargs\.ray_init\.num_gpus=1"):
        check_ray_cpus(config(), [NodeResources(16, 0)])


def test_a_pool_needs_whole_nodes():
    """Enough in all, but no node that holds a pool of 8 devices."""
    scattered = [NodeResources(64, 4)] * 4
    with pytest.raises(ResourceError, match=r"2 node\(s\) with 8 GPU slots and 24 CPUs each; 0 of 4"):
        check_ray_cpus(config(nnodes=2, devices=8), scattered)
    check_ray_cpus(config(nnodes=2, devices=8), [NodeResources(64, 8)] * 2)


def test_a_cluster_that_refuses_is_an_error():
    with pytest.raises(ResourceError, match=r"cluster at \S+:1 must answer"):
        check_ray_cpus(config(address="127.0.0.1:1"))


def test_a_cluster_that_does_not_answer_is_an_error_in_time(monkeypatch):
    def silent(address, timeout=None):
        assert timeout == ray_cpus.ANSWER_WITHIN_S
        raise TimeoutError("timed out")

    monkeypatch.setattr(ray_cpus.socket, "create_connection", silent)
    with pytest.raises(ResourceError, match=r"must answer within 10 s; got: timed out"):
        check_ray_cpus(config(address="127.0.0.1:1"))


def test_a_cluster_to_join_takes_no_slots_of_ours():
    with pytest.raises(ResourceError, match=r"num_cpus is for a cluster that the run starts itself.*address=local"):
        check_ray_cpus(config(address="127.0.0.1:1", num_cpus=16))


def test_address_local_starts_a_cluster_whatever_else_runs(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_ray_cpus(config(address="local", num_cpus=5, num_gpus=1))
