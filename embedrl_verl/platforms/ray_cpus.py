# SPDX-License-Identifier: Apache-2.0
"""Says before a run whether Ray can place its actors. verl and TransferQueue wait for ever, without a word, when it
cannot.

What holds resources in verl 0.9.1 (everything else asks for none): a resource pool reserves 3 CPUs and 1 "GPU" for
each device, all of a node's together on that node; the TransferQueue controller and each of its storage units hold
one CPU; rollouts on devices of their own hold 2 CPUs and 1 "GPU" a device. This package adds an Embedder's own pool,
and one CPU and its GPUs for each embedding server and for a sentence-transformers process. These are slots of Ray's own
book-keeping, not cores: on a small machine `ray_kwargs.ray_init.num_cpus` may be larger than the number of cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError

SEPARATE = "egrl_separate_async"
CPUS_PER_ROLLOUT_DEVICE = 2  # RolloutReplica.init_standalone
CPUS_PER_DEVICE = 3  # verl.single_controller.ray.base.ResourcePoolManager.max_colocate_count


class Node(NamedTuple):
    """Slots of one Ray node."""

    cpus: float
    gpus: float


class RayNeeds(NamedTuple):
    """Slots a run holds in all, with their sum term by term, and its pools as (nodes, devices a node)."""

    cpus: int
    gpus: int
    text: str
    pools: list[tuple[int, int]]


def ray_needs(config: Any) -> RayNeeds:
    """What a run with this verl config (DictConfig) holds in Ray."""
    pools = [(config.trainer.nnodes, config.trainer.n_gpus_per_node)]
    judge = config.reward.reward_model
    if judge.enable_resource_pool:
        pools.append((judge.nnodes, judge.n_gpus_per_node))
    backend = config.transfer_queue.backend
    units = backend.SimpleStorage.num_data_storage_units if backend.storage_backend == "SimpleStorage" else 0
    others = []  # (what, CPUs, GPUs)
    if OmegaConf.select(config, "trainer.v1.trainer_mode") == SEPARATE:
        rollout = config.actor_rollout_ref.rollout
        devices = rollout.nnodes * rollout.n_gpus_per_node
        others.append(("rollouts", CPUS_PER_ROLLOUT_DEVICE * devices, devices))
    embedder = OmegaConf.select(config, "embedrl.embedder")
    if embedder is not None:
        kind, server = embedder.get("backend", "worker"), embedder.get("server", {})
        if kind == "server" and not server.get("urls"):
            others.append(("embedding servers", server.servers, server.servers * server.n_gpus_per_server))
        elif kind == "sentence_transformers":
            others.append(("sentence-transformers process", 1, embedder.sentence.n_gpus))
        elif kind == "worker" and embedder.n_gpus_per_node:
            pools.append((embedder.nnodes, embedder.n_gpus_per_node))
    pooled = sum(nodes * devices for nodes, devices in pools)
    cpus = CPUS_PER_DEVICE * pooled + 1 + units + sum(held for _, held, _ in others)
    gpus = pooled + sum(held for _, _, held in others)
    beside = "".join(f", {held} {what}" for what, held, _ in others)
    text = (
        f"{cpus} CPUs ({CPUS_PER_DEVICE} for each of {pooled} devices, 1 TransferQueue controller, "
        f"{units} storage units{beside}) and {gpus} GPU slots"
    )
    return RayNeeds(cpus, gpus, text, pools)


def ray_nodes(config: Any) -> list[Node]:
    """Slots of each node: of the cluster that this process has joined (platforms.cluster), else of the one that the run
    will start here."""
    import ray
    import torch
    from ray._private.utils import get_num_cpus

    if ray.is_initialized():
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(slots.get("CPU", 0.0), slots.get("GPU", 0.0)) for slots in alive]
    cpus, gpus = (config.ray_kwargs.ray_init.get(name) for name in ("num_cpus", "num_gpus"))
    return [Node(get_num_cpus() if cpus is None else cpus, torch.cuda.device_count() if gpus is None else gpus)]


def check_ray_cpus(config: Any, nodes: Sequence[Node] | None = None) -> None:
    """Refuse a run that Ray cannot place. Nothing is started."""
    needs = ray_needs(config)
    nodes = ray_nodes(config) if nodes is None else nodes
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found = f"the run needs {needs.text}; Ray has {cpus:g} CPUs and {gpus:g} GPU slots on {len(nodes)} node(s)"
    if cpus < needs.cpus:
        raise ResourceError(
            f"{found}, {needs.cpus - cpus:g} CPUs too few. Set "
            f"ray_kwargs.ray_init.num_cpus={needs.cpus} (slots, not cores), or lower "
            "transfer_queue.backend.SimpleStorage.num_data_storage_units."
        )
    if gpus < needs.gpus:
        raise ResourceError(
            f"{found}, {needs.gpus - gpus:g} GPU slots too few. "
            f"Lower trainer.n_gpus_per_node or trainer.nnodes; on the platform cpu declare the slots: "
            f"+ray_kwargs.ray_init.num_gpus={needs.gpus}."
        )
    for count, devices in needs.pools:
        fitting = sum(node.cpus >= CPUS_PER_DEVICE * devices and node.gpus >= devices for node in nodes)
        if fitting < count:
            raise ResourceError(
                f"a pool needs {count} node(s) with {devices} GPU slots and {CPUS_PER_DEVICE * devices} CPUs each; "
                f"{fitting} of {len(nodes)} node(s) have them. "
                "Lower trainer.n_gpus_per_node, or start Ray on these nodes with more --num-cpus."
            )
