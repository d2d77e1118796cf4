# SPDX-License-Identifier: Apache-2.0
"""Worker classes: position ids keep their rows, gloo on a CPU, engines for the device, verl's own roles replaced."""

import os
import subprocess
import sys

import pytest
import ray
import torch
import torch.distributed
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import training_worker
from embedrl_verl.platforms.training_worker import (
    EmbedRLActorRolloutRefWorker,
    EmbedRLDetachActorWorker,
    NestedPositionIdsTrainingWorker,
    ResidentOnCpuMixin,
    rebuild_position_ids,
    use_nested_position_ids_workers,
)

BATCH_METHODS = ("train_mini_batch", "train_batch", "infer_batch")


def batch(lengths: list[int]) -> tuple[TensorDict, list[torch.Tensor]]:
    """A shard as TransferQueue packs it, and its rows of position ids (4, L)."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(0, 1000, (4, length), generator=generator) for length in lengths]
    columns = {
        "input_ids": torch.nested.as_nested_tensor([row[0] for row in rows], layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
    }
    return TensorDict(columns, batch_size=[len(lengths)]), rows


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("lengths", [[3, 5, 2], [4, 4], [4], [4, 4, 4, 4], [1, 4], [2, 2, 7]])
def test_every_row_comes_back(lengths, times):
    data, rows = batch(lengths)
    for _ in range(times):
        rebuild_position_ids(data)
    for found, expected in zip(data["position_ids"].unbind(), rows, strict=True):
        assert torch.equal(found, expected)
    selected = tu.index_select_tensor_dict(data, list(range(len(rows)))[::-1])
    for found, expected in zip(selected["position_ids"].unbind(), rows[::-1], strict=True):
        assert torch.equal(found, expected)
    padded = torch.nested.to_padded_tensor(data["position_ids"], padding=0, output_size=(len(rows), 4, max(lengths)))
    for found, expected in zip(padded, rows, strict=True):
        assert torch.equal(found[:, : expected.size(1)], expected)


def test_upstream_still_needs_rebuilt_ids():
    """The day verl reads equal lengths rightly (its issue 7899), this fails and the rebuilding can go."""
    data, _rows = batch([6, 6])
    tu.maybe_fix_3d_position_ids(data)
    with pytest.raises(RuntimeError):
        data["position_ids"].unbind()


def test_text_position_ids_and_other_batches_are_left_alone_and_unlike_columns_refused():
    values = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(2)], layout=torch.jagged)
    data = TensorDict({"input_ids": values, "position_ids": values}, batch_size=[2])
    rebuild_position_ids(data)
    assert data["position_ids"].dim() == 2
    rebuild_position_ids(TensorDict({"x": torch.zeros(2)}, batch_size=[2]))
    data, other = batch([3, 5])[0], batch([3, 4])[0]
    data["position_ids"] = other["position_ids"]
    with pytest.raises(ValueError, match="must cover the tokens of input_ids"):
        rebuild_position_ids(data)


@pytest.mark.parametrize("name", BATCH_METHODS)
def test_overridden_methods_rebuild_ids_and_are_dispatched_as_verls_own(name, monkeypatch):
    own, verls = (getattr(getattr(cls, name), MAGIC_ATTR) for cls in (NestedPositionIdsTrainingWorker, TrainingWorker))
    assert own["blocking"] == verls["blocking"] and own["execute_mode"] == verls["execute_mode"]
    assert own["dispatch_mode"].keys() == verls["dispatch_mode"].keys()
    monkeypatch.setattr(TrainingWorker, name, lambda self, data: tu.maybe_fix_3d_position_ids(data) or data)
    data, rows = batch([4, 4])
    method = getattr(NestedPositionIdsTrainingWorker, name)
    found = getattr(method, "__wrapped__", method)(object.__new__(NestedPositionIdsTrainingWorker), data)
    assert torch.equal(found["position_ids"].unbind()[1], rows[1])


@pytest.fixture
def rendezvous(tmp_path, monkeypatch):
    """A one-rank group's environment; the group is left again."""
    monkeypatch.setenv("DIST_INIT_METHOD", f"file://{tmp_path}/store")
    yield f"file://{tmp_path}/store"
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_upstreams_backend_string_is_still_refused(rendezvous):
    """The day torch takes verl's "cpu:gloo,cpu:gloo", this fails and init_cpu_process_group can go."""
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        torch.distributed.init_process_group("cpu:gloo,cpu:gloo", rank=0, world_size=1, init_method=rendezvous)


def test_the_cpu_group_is_gloo_and_joined_once_and_on_a_gpu_left_to_verl(rendezvous, monkeypatch):
    monkeypatch.setattr(training_worker, "get_device_name", lambda: "cuda")
    training_worker.init_cpu_process_group()
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(training_worker, "get_device_name", lambda: "cpu")
    training_worker.init_cpu_process_group()
    training_worker.init_cpu_process_group()
    assert torch.distributed.get_backend() == "gloo"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_upstream_still_pins_forward_only_models(rendezvous):
    """The day FSDP2's offload policy works without CUDA, this fails and ResidentOnCpuMixin can go."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=rendezvous)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError):
        fully_shard(torch.nn.Linear(4, 4), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=True))


@pytest.mark.parametrize(("device", "seen"), [("cpu", False), ("cuda", True)])
def test_a_forward_only_model_is_built_without_the_offload_policy_on_a_cpu_only(device, seen, monkeypatch):
    class Engine:
        def _build_fsdp_module(self, module):
            return self.engine_config.forward_only

    class OnCpu(ResidentOnCpuMixin, Engine):
        engine_config = OmegaConf.create({"forward_only": True})

    monkeypatch.setattr(training_worker, "get_device_name", lambda: device)
    assert OnCpu()._build_fsdp_module(None) is seen
    assert OnCpu.engine_config.forward_only, "afterwards the engine is forward-only again"


def test_unpickling_a_worker_class_registers_the_engines(monkeypatch):
    """A Ray actor gets the class by reference; importing its module must be enough."""
    code = (
        "import embedrl_verl.platforms.training_worker\nfrom verl.workers.engine import EngineRegistry\n"
        "print(*(EngineRegistry.get_engine_cls(f'{one}_model', 'fsdp2').__name__ for one in ('language', 'value')))"
    )
    environment = {**os.environ, "VERL_PLATFORM": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "CpuEngineWithLMHead CpuEngineWithValueHead\n"
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cpu")
    with pytest.raises(ValueError, match="No engine registered"):
        EngineRegistry.get_engine_cls("language_model", "fsdp")


def test_verls_roles_get_the_classes_of_this_package():
    verls = {"actor_rollout": ActorRolloutRefWorker, "actor": DetachActorWorker, "critic": TrainingWorker}
    mapping = {role: ray.remote(cls) for role, cls in verls.items()}
    use_nested_position_ids_workers(mapping)
    use_nested_position_ids_workers(mapping)
    assert mapping["actor_rollout"].__ray_actor_class__ is EmbedRLActorRolloutRefWorker
    assert mapping["critic"].__ray_actor_class__ is NestedPositionIdsTrainingWorker
    assert mapping["actor"].__ray_actor_class__ is EmbedRLDetachActorWorker
    for cls in (EmbedRLActorRolloutRefWorker, EmbedRLDetachActorWorker):
        assert cls.actor_worker_cls is cls.ref_worker_cls is NestedPositionIdsTrainingWorker

    class Other(ActorRolloutRefWorker):
        pass

    with pytest.raises(PluginError, match=r"role actor must be one of ActorRolloutRefWorker, .*; got Other"):
        use_nested_position_ids_workers({"actor": ray.remote(Other)})


@pytest.mark.parametrize(("device", "apart"), [("cpu", True), ("cuda", False)])
def test_weights_put_aside_on_a_cpu_do_not_change_with_the_actors(device, apart, rendezvous, monkeypatch):
    """The day verl's own copy is one on a CPU too, the second case fails and `copied_apart` can go."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=rendezvous)
    module = fully_shard(torch.nn.Linear(4, 4), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    monkeypatch.setattr(training_worker, "get_device_name", lambda: device)
    worker = object.__new__(EmbedRLDetachActorWorker)
    worker.config, worker._strategy_handlers = OmegaConf.create({"actor": {"strategy": "fsdp2"}}), None
    assert worker.restore_handler is fsdp2_sharded_load_from_cpu
    assert (worker.copy_handler is fsdp2_sharded_save_to_cpu) is not apart
    before = module.weight.full_tensor().detach().clone()
    saved, layout = worker.copy_handler(module)
    with torch.no_grad():
        module.weight.add_(1.0)
    worker.restore_handler(module, saved, layout)
    assert torch.equal(module.weight.full_tensor(), before) is apart
