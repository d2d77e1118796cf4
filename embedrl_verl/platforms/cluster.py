# SPDX-License-Identifier: Apache-2.0
"""A run whose processes are on several nodes: paths, environment, and where the trainer itself runs.

A worker of a Ray cluster that is joined has the working directory and the environment of its node's `ray start`, not
those of the person who starts the run. So paths are made absolute, variables that the run's processes read are handed
on through Ray's runtime environment, and the trainer, which writes metrics and dumps, runs where the run was started.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from embedrl_verl.errors import ConfigError, ResourceError
from embedrl_verl.platforms.compat import VERL_VERSION, require_version
from embedrl_verl.progress import metrics_path

INPUTS = (
    *("data.train_files", "data.val_files", "data.media_root", "data.custom_cls.path"),
    *("actor_rollout_ref.model.path", "actor_rollout_ref.model.hf_config_path"),
    *("actor_rollout_ref.model.lora_adapter_path", "actor_rollout_ref.model.tokenizer_path"),
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    *("embedrl.embedder.path", "embedrl.embedder.train.anchor_files", "embedrl.embedder.train.lora_adapter_path"),
    *("reward.custom_reward_function.path", "reward.reward_model.model_path", "trainer.resume_from_path"),
)
"""Keys of paths that are read. One that is not there may be a hub id, and stays as it is."""
OUTPUTS = ("trainer.default_local_dir", "trainer.rollout_data_dir", "trainer.validation_data_dir")
HANDED_ON = ("TOKENIZERS_PARALLELISM", "TENSORBOARD_DIR", "TORCH_COMPILE_DISABLE", "TRANSFORMERS_OFFLINE")
PREFIXES = ("HF_", "VERL_", "VLLM_", "WANDB_")
"""Variables that processes of a run read, beside those that hold the servers' keys."""
OF_A_NODE = ("VLLM_HOST_IP", "VLLM_PORT")
KEY_NAMES = ("embedrl.judge.api_key_env", "embedrl.embedder.server.api_key_env")
ANSWER_WITHIN_S = 10


@dataclass(frozen=True)
class Cluster:
    """Where the workers of a command are.

    Attributes:
        address: HOST:PORT of a Ray cluster that is there, or "auto"; None: this machine alone.
        workers: of them; None: one a GPU, without GPUs one a node.
    """

    address: str | None = None
    workers: int | None = None


def make_paths_absolute(config: Any) -> None:
    """Replace relative paths of the configuration, and of verl's metrics file, by absolute ones, in place."""
    for key in (*INPUTS, *OUTPUTS):
        value = OmegaConf.select(config, key)
        if not value:
            continue
        several = isinstance(value, (list, tuple, ListConfig))
        changed = [_absolute(str(one), written=key in OUTPUTS) for one in (value if several else [value])]
        OmegaConf.update(config, key, changed if several else changed[0])
    file = metrics_path(config)
    if file is not None:
        os.environ["VERL_FILE_LOGGER_PATH"] = str(file.absolute())


def _absolute(path: str, *, written: bool) -> str:
    local = Path(path).expanduser()
    return str(local.absolute()) if "://" not in path and (written or local.exists()) else path


def joins_a_cluster(config: Any) -> bool:
    """Whether the run's processes are started by a Ray cluster that is there already."""
    return _address(config) is not None


def _address(config: Any) -> str | None:
    """Of the cluster that ray.init will join by the configuration, by RAY_ADDRESS, or because `ray start` has left one
    on this machine. "auto" stays where there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    address = config.ray_kwargs.ray_init.get("address")
    try:
        found: str | None = canonicalize_bootstrap_address(address)
    except ConnectionError:
        return "auto"
    except ValueError as error:
        raise ConfigError(
            f"RAY_ADDRESS must be HOST:PORT, auto or local; got a value that Ray refuses ({error})"
        ) from error
    return found


def variables_to_hand_on(config: Any) -> dict[str, str]:
    """Variables of this process that the run's processes on other nodes need.

    Without those that the job was submitted with: they are everywhere, and Ray refuses to be given them again.
    """
    return variables_of({OmegaConf.select(config, key) for key in KEY_NAMES} - {None})


def variables_of(names: Collection[str]) -> dict[str, str]:
    """`variables_to_hand_on`: the usual ones, and these."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    named = {*names, *HANDED_ON, *(name for name in os.environ if name.startswith(PREFIXES))}
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    given = {*OF_A_NODE, *((job.get("runtime_env") or {}).get("env_vars") or {})}
    return {name: os.environ[name] for name in sorted(named - given) if name in os.environ}


def check_home() -> None:
    """Ray 2.60 keeps the token of a cluster in HOME, and ends in a traceback where that cannot be written."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    folder = Path.home() / ".ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ResourceError(
            f"{folder} cannot be written, where Ray keeps the token of its cluster. Set HOME to a folder that can, or "
            "RAY_AUTH_TOKEN to a secret, or RAY_AUTH_MODE=disabled on a machine that you alone use"
        )


def join_cluster(config: Any) -> None:
    """Connect to a cluster that is there as verl 0.9.1's `run_ppo` would, which does not once this has: with the
    variables beside. A cluster of the run's own is left to verl.

    The variables are not put into the configuration, which verl prints and hands to its loggers: there are keys among
    them.
    """
    address = _address(config)
    if address is None:
        return
    import ray
    import verl
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    require_version("verl", verl.__version__, VERL_VERSION, "joining a Ray cluster")
    own_slots = [key for key in ("num_cpus", "num_gpus") if config.ray_kwargs.ray_init.get(key) is not None]
    if own_slots:
        raise ResourceError(
            f"ray_kwargs.ray_init.{own_slots[0]} is for a cluster that the run starts itself; it would join the one at "
            f"{address}. Set +ray_kwargs.ray_init.address=local to start one all the same, end that one (ray stop), or "
            f"set {' and '.join(own_slots)} to null."
        )
    refuse_silent(address)
    default = get_ppo_ray_runtime_env(config)
    given = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    assert isinstance(given, dict)
    own = given.pop("runtime_env", None) or {}
    variables = {**default.get("env_vars", {}), **variables_to_hand_on(config), **(own.get("env_vars") or {})}
    if config.transfer_queue.enable:
        variables["TRANSFER_QUEUE_ENABLE"] = "1"
    ray.init(**given, runtime_env={**default, **own, "env_vars": variables})
    _refuse_busy(address)


def refuse_silent(address: str) -> None:
    """Refuse HOST:PORT that does not answer. ResourceError."""
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_WITHIN_S).close()
    except (OSError, ValueError) as error:  # "auto" has no port
        raise ResourceError(
            f"the Ray cluster at {address} must answer within {ANSWER_WITHIN_S} s; got: {error}. "
            "Start it (ray start --head), or unset RAY_ADDRESS."
        ) from error


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


class OnThisNode:
    """Stands for verl's TaskRunner class: its actor is started on the node of the process that starts it, if that has
    room.
    """

    def __init__(self, task_runner: Any) -> None:
        self._task_runner = task_runner

    def options(self, **options: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        return self._task_runner.options(scheduling_strategy=here, **options)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.options().remote(*arguments, **named)
