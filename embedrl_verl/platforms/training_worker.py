# SPDX-License-Identifier: Apache-2.0
"""Worker classes that run verl's engines on any platform of this package, and rebuild nested position ids before verl
uses them.

- `NestedPositionIdsTrainingWorker`: verl's TrainingWorker; on a CPU it creates the gloo group before verl asks torch
  for "cpu:gloo,cpu:gloo", which torch rejects (verl skips its own call when a group exists).
- `EmbedRLActorRolloutRefWorker`: verl's hybrid worker with the class above for actor and reference (verl's own class
  attributes). `EmbedRLDetachActorWorker`: the same for the actor of separate asynchronous training.
- `use_nested_position_ids_workers`: puts both into a trainer's `role_worker_mapping`.

Importing this module registers the engines for the device `cpu`; unpickling one of the classes in a Ray actor imports
it there.
"""

import os
from collections.abc import Callable
from typing import Any

import ray
import torch.distributed
from tensordict import TensorDict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.device import get_device_name
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import (
    cpu_engines,  # noqa: F401  (registers them)
    patches,
    varlen,
)
from embedrl_verl.platforms.position_ids import rebuild_position_ids


def init_cpu_process_group() -> None:
    """On the platform `cpu`: joins the global gloo group from RANK, WORLD_SIZE and DIST_INIT_METHOD, if none exists
    yet.
    """
    if get_device_name() != "cpu" or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="gloo",
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


class NestedPositionIdsTrainingWorker(TrainingWorker):
    """TrainingWorker whose batches have well-formed position ids, on GPUs and CPUs, and whose models can be packed
    without flash-attn; see the module docstring.
    """

    def __init__(self, config: Any) -> None:
        varlen.register()
        patches.keep_attention_of_transformers()
        patches.run_the_vision_model_once()
        patches.compute_log_probs_in_the_head()
        # verl sets what it overrides as a plain attribute too, which every checkpoint's config.json would then have: no
        # other process could load one that names an attention of this package.
        vars(config.model_config.hf_config).pop("attn_implementation", None)
        init_cpu_process_group()
        super().__init__(config)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """verl's mini-batch loop on rebuilt position ids."""
        rebuild_position_ids(data)
        return super().train_mini_batch(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """verl's training step on rebuilt position ids."""
        rebuild_position_ids(data)
        return super().train_batch(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        """verl's forward pass on rebuilt position ids."""
        rebuild_position_ids(data)
        return super().infer_batch(data)


class EmbedRLActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's hybrid worker with NestedPositionIdsTrainingWorker for actor and reference."""

    actor_worker_cls = NestedPositionIdsTrainingWorker
    ref_worker_cls = NestedPositionIdsTrainingWorker


class EmbedRLDetachActorWorker(DetachActorWorker):
    """verl's worker that can put the actor's weights aside and take them back, with NestedPositionIdsTrainingWorker for
    actor and reference.
    """

    actor_worker_cls = NestedPositionIdsTrainingWorker
    ref_worker_cls = NestedPositionIdsTrainingWorker

    @property
    def copy_handler(self) -> Callable[[Any], Any]:
        """verl's function that copies the weights to the CPU. On a CPU, what torch returns for that are the weights
        themselves, which the next update would change; so there they are copied once more.
        """
        copy: Callable[[Any], Any] = super().copy_handler
        return copied_apart(copy) if get_device_name() == "cpu" else copy


def copied_apart(copy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`copy` of verl's FSDP2 (module -> ({name: (tensor, layout)}, layout)) with tensors that share no memory with the
    module's.
    """

    def handler(module: Any) -> Any:
        state, layout = copy(module)
        return {name: (tensor.clone(), one) for name, (tensor, one) in state.items()}, layout

    return handler


_REPLACEMENT: dict[type, type] = {
    ActorRolloutRefWorker: EmbedRLActorRolloutRefWorker,
    DetachActorWorker: EmbedRLDetachActorWorker,
    TrainingWorker: NestedPositionIdsTrainingWorker,
}


def use_nested_position_ids_workers(role_worker_mapping: dict[Any, Any]) -> None:
    """Replaces verl's worker classes in `role_worker_mapping` (role -> Ray actor class) by those of this module, in
    place.

    Call it after `super()._init_resource_pool_mgr()`. Raises PluginError for a class that it does not know, since
    that one would run with verl's own handling of position ids.
    """
    for role, actor_class in role_worker_mapping.items():
        worker_class = actor_class.__ray_actor_class__
        if worker_class in _REPLACEMENT.values():
            continue
        if worker_class not in _REPLACEMENT:
            known = ", ".join(cls.__name__ for cls in _REPLACEMENT)
            raise PluginError(
                f"worker class of role {role} must be one of {known}; got {worker_class.__name__}. "
                "Use one of this package's trainer modes, or subclass NestedPositionIdsTrainingWorker for this role."
            )
        role_worker_mapping[role] = ray.remote(_REPLACEMENT[worker_class])
