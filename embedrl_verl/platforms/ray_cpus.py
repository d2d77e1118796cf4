# SPDX-License-Identifier: Apache-2.0
"""Says before a run whether Ray can place its actors. verl and TransferQueue wait for ever, without a word, when it
cannot.

What holds resources in verl 0.9.1 (everything else asks for none): a resource pool reserves 3 CPUs and 1 "GPU" for
each device, all of a node's together on that node; the TransferQueue controller and each of its storage units hold
one CPU; rollouts on devices of their own hold 2 CPUs and 1 "GPU" a device. This package adds an Embedder's own pool,
and one CPU and its GPUs for each embedding server and for a sentence-transformers process. These are slots of Ray's own
book-keeping, not cores: on a small machine `ray_kwargs.ray_init.num_cpus` may be larger than the number of cores.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.errors import ResourceError

SEPARATE = "egrl_separate_async"
CPUS_PER_ROLLOUT_DEVICE = 2  # RolloutReplica.init_standalone
CPUS_PER_DEVICE = 3  # verl.single_controller.ray.base.ResourcePoolManager.max_colocate_count

ANSWER_WITHIN_S = 10


@dataclass(frozen=True)
class NodeResources:
    """Slots of one Ray node."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class RayNeeds:
    """Slots a run holds. A pool is (nodes, devices a node); `others` are (what, CPUs, GPUs)."""

    pools: tuple[tuple[int, int], ...]
    storage_units: int
    others: tuple[tuple[str, int, int], ...] = ()

    @property
    def _pooled(self) -> int:
        return sum(nodes * devices for nodes, devices in self.pools)

    @property
    def cpus(self) -> int:
        """CPUs in all: 3 a device, the TransferQueue controller, its storage units, the others."""
        return CPUS_PER_DEVICE * self._pooled + 1 + self.storage_units + sum(cpus for _, cpus, _ in self.others)

    @property
    def gpus(self) -> int:
        """Devices in all."""
        return self._pooled + sum(gpus for _, _, gpus in self.others)

    def describe(self) -> str:
        """The sum, term by term."""
        others = "".join(f", {cpus} {what}" for what, cpus, _ in self.others)
        return (
            f"{self.cpus} CPUs ({CPUS_PER_DEVICE} for each of {self._pooled} devices, 1 TransferQueue controller, "
            f"{self.storage_units} storage units{others}) and {self.gpus} GPU slots"
        )


def ray_needs(config: Any) -> RayNeeds:
    """What a run with this verl config (DictConfig) holds in Ray."""
    pools = [(config.trainer.nnodes, config.trainer.n_gpus_per_node)]
    judge = config.reward.reward_model
    if judge.enable_resource_pool:
        pools.append((judge.nnodes, judge.n_gpus_per_node))
    backend = config.transfer_queue.backend
    units = backend.SimpleStorage.num_data_storage_units if backend.storage_backend == "SimpleStorage" else 0
    others = []
    if OmegaConf.select(config, "trainer.v1.trainer_mode") == SEPARATE:
        rollout = config.actor_rollout_ref.rollout
        devices = rollout.nnodes * rollout.n_gpus_per_node
        others.append(("rollouts", CPUS_PER_ROLLOUT_DEVICE * devices, devices))
    embedder = OmegaConf.select(config, "embedrl.embedder")
    if embedder is not None:
        backend_name, server = embedder.get("backend", "worker"), embedder.get("server", {})
        if backend_name == "server" and not server.get("urls"):
            others.append(("embedding servers", server.servers, server.servers * server.n_gpus_per_server))
        elif backend_name == "sentence_transformers":
            others.append(("sentence-transformers process", 1, embedder.sentence.n_gpus))
        elif backend_name == "worker" and embedder.n_gpus_per_node:
            pools.append((embedder.nnodes, embedder.n_gpus_per_node))
    return RayNeeds(pools=tuple(pools), storage_units=units, others=tuple(others))


def ray_nodes(config: Any) -> list[NodeResources]:
    """Slots of each node that a run with this config will see: of the cluster it joins, else of the one it starts here.

    Raises ResourceError when there is a cluster to join (an address in the config or in RAY_ADDRESS, or one that
    `ray start` left on this machine) and it does not answer, or the config has slots that only a new cluster can take.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    if ray.is_initialized():
        return _alive_nodes()
    ray_init = config.ray_kwargs.ray_init
    address = canonicalize_bootstrap_address(ray_init.get("address"))  # the decision that ray.init will take
    if address is None:
        return [_local_node(config)]
    own = [key for key in ("num_cpus", "num_gpus") if ray_init.get(key) is not None]
    if own:
        raise ResourceError(
            f"ray_kwargs.ray_init.{own[0]} is for a cluster that the run starts itself; it would join the one at "
            f"{address}. Set +ray_kwargs.ray_init.address=local to start one all the same, end that one (ray stop), or "
            f"set {' and '.join(own)} to null."
        )
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_WITHIN_S).close()
    except OSError as error:
        raise ResourceError(
            f"the Ray cluster at {address} must answer within {ANSWER_WITHIN_S} s; got: {error}. "
            "Start it (ray start --head), or unset RAY_ADDRESS."
        ) from error
    ray.init(address=address, log_to_driver=False)
    try:
        _refuse_busy(address)
        return _alive_nodes()
    finally:
        ray.shutdown()


def _refuse_busy(address: str) -> None:
    """TransferQueue has one queue for a whole cluster, which a second run would read from, and close at its end."""
    import ray

    try:
        ray.get_actor("TransferQueueController", namespace="transfer_queue")
    except ValueError:
        return
    raise ResourceError(
        f"another run is at work in the Ray cluster at {address}, and TransferQueue, which verl's rollouts pass "
        "through, has one queue for a cluster: two runs would train on each other's rollouts. Wait until it ends, or "
        "give this run a cluster of its own (on other nodes, or in a container with a /tmp of its own)"
    )


def _alive_nodes() -> list[NodeResources]:
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeResources(cpus=slots.get("CPU", 0.0), gpus=slots.get("GPU", 0.0)) for slots in found]


def _local_node(config: Any) -> NodeResources:
    import torch
    from ray._private.utils import get_num_cpus

    ray_init = config.ray_kwargs.ray_init
    cpus, gpus = ray_init.get("num_cpus"), ray_init.get("num_gpus")
    return NodeResources(
        cpus=get_num_cpus() if cpus is None else cpus, gpus=torch.cuda.device_count() if gpus is None else gpus
    )


def check_ray_cpus(config: Any, nodes: Sequence[NodeResources] | None = None) -> RayNeeds:
    """Raises ResourceError that names what is missing when Ray cannot place the run; returns the needs otherwise.

    config: verl's whole config; nodes: the cluster's nodes, by default `ray_nodes(config)`. Takes well under a second
    when Ray has not been started, since nothing is started for it.
    """
    needs = ray_needs(config)
    nodes = ray_nodes(config) if nodes is None else nodes
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found = f"Ray has {cpus:g} CPUs and {gpus:g} GPU slots on {len(nodes)} node(s)"
    if cpus < needs.cpus:
        raise ResourceError(
            f"the run needs {needs.describe()}; {found}, {needs.cpus - cpus:g} CPUs too few. Set "
            f"ray_kwargs.ray_init.num_cpus={needs.cpus} (slots, not cores), or lower "
            "transfer_queue.backend.SimpleStorage.num_data_storage_units."
        )
    if gpus < needs.gpus:
        raise ResourceError(
            f"the run needs {needs.describe()}; {found}, {needs.gpus - gpus:g} GPU slots too few. "
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
    return needs
