# SPDX-License-Identifier: Apache-2.0
"""verl's worker classes and FSDP2 engines as this package runs them, on GPUs and CPUs.

Importing this module registers the engines for the device `cpu`; unpickling a worker class in a Ray actor imports it
there. FSDP1 is not offered on a CPU: it refuses CPU modules with sync_module_states.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
import torch
from tensordict import TensorDict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import patches, varlen


class ResidentOnCpuMixin:
    """Before an FSDP engine class: on the platform `cpu`, a forward-only module is sharded like a trained one.

    verl keeps a forward-only model (the reference policy, a frozen Embedder) behind FSDP2's CPU offload policy with
    pinned memory. Pinning asks for a CUDA driver, and on a CPU there is nothing to offload from.
    """

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        forward_only = self.engine_config.forward_only
        self.engine_config.forward_only = forward_only and get_device_name() != "cpu"
        try:
            return super()._build_fsdp_module(module)  # type: ignore[misc]  # verl's engine follows in the MRO
        finally:
            self.engine_config.forward_only = forward_only


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CpuEngineWithLMHead(ResidentOnCpuMixin, FSDPEngineWithLMHead):
    """verl's language-model engine on a CPU."""


@EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")
class CpuEngineWithValueHead(ResidentOnCpuMixin, FSDPEngineWithValueHead):
    """verl's critic engine on a CPU."""


def rebuild_position_ids(data: TensorDict) -> None:
    """Rebuild the nested M-RoPE `position_ids` of a batch whose ragged dimension was lost (verl issue 7899), in place.

    A row's ids have shape (4, L): text position and three M-RoPE rows. TransferQueue packs the rows of a shard with
    `torch.nested.as_nested_tensor`, which takes the first dimension that differs as the ragged one. When all L of the
    shard agree (always so with one row) that is the 4, and verl 0.9.1 then marks dimension 2 as ragged without looking
    at the values (`maybe_fix_3d_position_ids`): unbinding raises, and chunking can cut the ids to 4 columns without an
    error. `input_ids`, jagged (B, L_i), is always packed rightly, so its lengths tell what the values are: afterwards
    they have shape (4, sum L_i) and dimension 2 is ragged. (B, L) ids and dense tensors are left alone.
    """
    keys = data.keys()
    if "position_ids" not in keys or "input_ids" not in keys:
        return
    position_ids, input_ids = data["position_ids"], data["input_ids"]
    if not (position_ids.is_nested and position_ids.dim() == 3 and input_ids.is_nested):
        return
    lengths: list[int] = input_ids.offsets().diff().tolist()
    values: torch.Tensor = position_ids.values()
    if values.dim() == 2 and values.size(-1) == sum(lengths):
        rows = list(values.split(lengths, dim=-1))
    elif len(set(lengths)) == 1 and values.numel() % sum(lengths) == 0:
        rows = list(values.reshape(len(lengths), -1, lengths[0]).unbind())
    else:
        raise ValueError(
            f"position_ids must cover the tokens of input_ids; got values of shape {tuple(values.shape)} "
            f"for lengths {lengths}. Write both columns of a row from the same tokens."
        )
    data["position_ids"] = tu.nested_tensor_from_tensor_list(rows, ragged_idx=2)


def init_cpu_process_group() -> None:
    """On the platform `cpu`: join the global gloo group from RANK, WORLD_SIZE and DIST_INIT_METHOD, if none exists yet.

    verl asks torch for "cpu:gloo,cpu:gloo", which torch rejects, and skips that when a group exists.
    """
    if get_device_name() != "cpu" or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="gloo",
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


_on_each_data_rank = register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)


class NestedPositionIdsTrainingWorker(TrainingWorker):
    """verl's TrainingWorker whose batches have rebuilt position ids, and whose models can be packed without
    flash-attn.
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

    @_on_each_data_rank
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        rebuild_position_ids(data)
        return super().train_mini_batch(data)

    @_on_each_data_rank
    def train_batch(self, data: TensorDict) -> TensorDict:
        rebuild_position_ids(data)
        return super().train_batch(data)

    @_on_each_data_rank
    def infer_batch(self, data: TensorDict) -> TensorDict:
        rebuild_position_ids(data)
        return super().infer_batch(data)


class EmbedRLActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's hybrid worker with NestedPositionIdsTrainingWorker for actor and reference."""

    actor_worker_cls = NestedPositionIdsTrainingWorker
    ref_worker_cls = NestedPositionIdsTrainingWorker


class EmbedRLDetachActorWorker(DetachActorWorker):
    """The same for the actor of separate asynchronous training, whose weights can be put aside and taken back."""

    actor_worker_cls = NestedPositionIdsTrainingWorker
    ref_worker_cls = NestedPositionIdsTrainingWorker

    @property
    def copy_handler(self) -> Callable[[Any], Any]:
        """verl's function that copies the weights (module -> ({name: (tensor, layout)}, layout)) to the CPU.

        On a CPU, what torch returns for that are the weights themselves, which the next update would change.
        """
        copy: Callable[[Any], Any] = super().copy_handler
        if get_device_name() != "cpu":
            return copy

        def copied_apart(module: Any) -> Any:
            state, layout = copy(module)
            return {name: (tensor.clone(), one) for name, (tensor, one) in state.items()}, layout

        return copied_apart


_REPLACEMENT: dict[type, type] = {
    ActorRolloutRefWorker: EmbedRLActorRolloutRefWorker,
    DetachActorWorker: EmbedRLDetachActorWorker,
    TrainingWorker: NestedPositionIdsTrainingWorker,
}


def use_nested_position_ids_workers(role_worker_mapping: dict[Any, Any]) -> None:
    """Replace verl's worker classes in `role_worker_mapping` (role -> Ray actor class) by those of this module, in
    place.
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
