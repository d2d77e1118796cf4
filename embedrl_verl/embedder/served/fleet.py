# SPDX-License-Identifier: Apache-2.0
"""Embedding servers of a run: one Ray actor each, in a placement group of their own.

An actor holds its server's devices, starts it on the actor's node and watches it (`process`). Actors end with the
trainer, and servers with their actors, also when these are killed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served.command import ServerOptions, server_arguments, server_command, server_options
from embedrl_verl.embedder.served.process import ServerProcess
from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.platforms.ports import free_port

logger = logging.getLogger(__name__)
PLACED_WITHIN_S = 60.0
STATE_WITHIN_S = 5.0


class _ServerActor:
    """Owns one server; lives on the node and devices on which the server runs."""

    def __init__(self, index: int, options: ServerOptions, startup_s: float) -> None:
        folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / f"embedding_server_{index}"
        folder.mkdir(parents=True, exist_ok=True)
        template = folder / "chat_template.jinja"
        template.write_text(options.template, encoding="utf-8")
        gpus = ray.get_gpu_ids()
        host, environment = ray.util.get_node_ip_address(), dict(os.environ)
        if not options.on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
            options = replace(options, gpus=max(len(gpus), 1))
        port = free_port(host)
        arguments = server_arguments(options, template, host=host, port=port)
        self._process = ServerProcess(
            server_command(arguments, python()),
            environment,
            f"http://{host}:{port}",
            folder / "server.log",
            startup_s=startup_s,
        )

    def url(self) -> str:
        return self._process.url

    def wait_ready(self) -> None:
        self._process.wait_ready()

    def state(self) -> tuple[int, str | None]:
        return self._process.restarts, self._process.failure

    def stop(self) -> None:
        self._process.stop()


class ServerFleet:
    """Starts the servers of a section at once; `urls` answer after `wait_ready`.

    Args:
        config: the section `embedrl.embedder`.
        processor: for its checkpoint.
        on_cpu: servers run on the CPU.

    Raises:
        ResourceError: the cluster has no room for them.
    """

    def __init__(self, config: EmbedderConfig, processor: EmbedProcessor, *, on_cpu: bool) -> None:
        server = config.server
        gpus = server.n_gpus_per_server
        self._group = _placed([{"CPU": 1.0, **({"GPU": float(gpus)} if gpus else {})}] * server.servers)
        options = server_options(config, processor, on_cpu=on_cpu)
        actor = ray.remote(_ServerActor)
        self._actors = [
            actor.options(
                num_cpus=1,
                num_gpus=gpus,
                max_concurrency=4,  # questions while one waits
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i),
            ).remote(i, options, server.startup_s)
            for i in range(server.servers)
        ]
        self._restarts = [0] * server.servers
        self.urls: list[str] = ray.get([one.url.remote() for one in self._actors])

    def wait_ready(self) -> None:
        """Block until all servers answer.

        Raises:
            EmbedderError: one does not; with the end of its log.
        """
        ray.get([one.wait_ready.remote() for one in self._actors])

    def states(self) -> list[tuple[int, str | None]]:
        """Of each server: restarts so far, and why it was given up (or None). Never raises: one lost node is no reason
        to end a run whose rows other servers embed."""
        asked = [one.state.remote() for one in self._actors]
        return [self._state(answer, place) for place, answer in enumerate(asked)]

    def _state(self, answer: Any, place: int) -> tuple[int, str | None]:
        try:
            restarts, failure = ray.get(answer, timeout=STATE_WITHIN_S)
            self._restarts[place] = restarts
        except ray.exceptions.GetTimeoutError:
            failure = f"its process says nothing within {STATE_WITHIN_S:.0f} s"
        except ray.exceptions.RayError as error:
            failure = f"its process is lost ({type(error).__name__}), and nobody starts the server again"
        return self._restarts[place], failure

    def stop(self) -> None:
        """End all servers and give their devices back."""
        ray.get([one.stop.remote() for one in self._actors])
        for one in self._actors:
            ray.kill(one)
        remove_placement_group(self._group)


def _placed(bundles: list[dict[str, float]]) -> PlacementGroup:
    """A placement group with these bundles (a server's devices are on one node)."""
    group = placement_group(bundles, strategy="PACK", name="embedding_servers")
    if not group.wait(PLACED_WITHIN_S):
        remove_placement_group(group)
        free = ray.available_resources()
        raise ResourceError(
            f"{len(bundles)} embedding servers ask for {bundles[0]} each (embedrl.embedder.server.servers and "
            f"n_gpus_per_server), and Ray did not place them within {PLACED_WITHIN_S:.0f} s: "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are left beside the run's other processes. "
            "Lower them, or add devices"
        )
    return group
