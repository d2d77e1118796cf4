# SPDX-License-Identifier: Apache-2.0
"""Worker classes: gloo on a CPU, engines for the device, and verl's own roles replaced."""

import subprocess
import sys

import pytest
import ray
import torch
import torch.distributed
from omegaconf import OmegaConf
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import cpu_engines, training_worker
from embedrl_verl.platforms.cpu_engines import ResidentOnCpuMixin
from embedrl_verl.platforms.training_worker import (
    EmbedRLActorRolloutRefWorker,
    EmbedRLDetachActorWorker,
    NestedPositionIdsTrainingWorker,
    use_nested_position_ids_workers,
)

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


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


def test_the_cpu_group_is_gloo_and_joined_once(rendezvous, monkeypatch):
    monkeypatch.setattr(training_worker, "get_device_name", lambda: "cpu")
    training_worker.init_cpu_process_group()
    assert torch.distributed.get_backend() == "gloo"
    training_worker.init_cpu_process_group()


def test_on_a_gpu_the_group_is_left_to_verl(monkeypatch):
    monkeypatch.setattr(training_worker, "get_device_name", lambda: "cuda")
    training_worker.init_cpu_process_group()
    assert not torch.distributed.is_initialized()


@no_cuda
def test_upstream_still_pins_forward_only_models(rendezvous):
    """The day FSDP2's offload policy works without CUDA, this fails and ResidentOnCpuMixin can go."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=rendezvous)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError):
        fully_shard(torch.nn.Linear(4, 4), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=True))


@pytest.mark.parametrize(("device", "seen"), [("cpu", False), ("cuda", True)])
def test_a_forward_only_model_is_built_without_the_offload_policy_on_a_cpu_only(device, seen, monkeypatch):
    class Config:
        forward_only = True

    class Engine:
        def _build_fsdp_module(self, module):
            return self.engine_config.forward_only

    class OnCpu(ResidentOnCpuMixin, Engine):
        engine_config = Config()

    monkeypatch.setattr(cpu_engines, "get_device_name", lambda: device)
    engine = OnCpu()
    assert engine._build_fsdp_module(None) is seen
    assert engine.engine_config.forward_only, "afterwards the engine is forward-only again"


def test_engines_for_the_cpu_are_found(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cpu")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is cpu_engines.CpuEngineWithLMHead
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is cpu_engines.CpuEngineWithValueHead
    with pytest.raises(ValueError, match="No engine registered"):
        EngineRegistry.get_engine_cls("language_model", "fsdp")


def test_overridden_methods_are_dispatched_as_verls_own():
    for name in ("train_mini_batch", "train_batch", "infer_batch"):
        own = getattr(getattr(NestedPositionIdsTrainingWorker, name), MAGIC_ATTR)
        verls = getattr(getattr(TrainingWorker, name), MAGIC_ATTR)
        assert own["blocking"] == verls["blocking"] and own["execute_mode"] == verls["execute_mode"]
        assert own["dispatch_mode"].keys() == verls["dispatch_mode"].keys()


def test_verls_roles_get_the_classes_of_this_package():
    mapping = {
        "actor_rollout": ray.remote(ActorRolloutRefWorker),
        "actor": ray.remote(DetachActorWorker),
        "critic": ray.remote(TrainingWorker),
    }
    use_nested_position_ids_workers(mapping)
    use_nested_position_ids_workers(mapping)
    assert mapping["actor_rollout"].__ray_actor_class__ is EmbedRLActorRolloutRefWorker
    assert mapping["critic"].__ray_actor_class__ is NestedPositionIdsTrainingWorker
    assert mapping["actor"].__ray_actor_class__ is EmbedRLDetachActorWorker
    for cls in (EmbedRLActorRolloutRefWorker, EmbedRLDetachActorWorker):
        assert cls.actor_worker_cls is cls.ref_worker_cls is NestedPositionIdsTrainingWorker


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


def test_a_worker_class_that_is_not_known_is_refused():
    class Other(ActorRolloutRefWorker):
        pass

    with pytest.raises(
        PluginError, match=r"role actor must be one of ActorRolloutRefWorker, .*TrainingWorker; got Other"
    ):
        use_nested_position_ids_workers({"actor": ray.remote(Other)})


def test_unpickling_a_worker_class_registers_the_engines():
    """A Ray actor gets the class by reference; importing its module must be enough."""
    code = (
        "import embedrl_verl.platforms.training_worker\n"
        "from verl.workers.engine import EngineRegistry\n"
        "print(EngineRegistry.get_engine_cls('language_model', 'fsdp2').__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=training_env(), capture_output=True, text=True, timeout=200, check=True
    )
    assert result.stdout == "CpuEngineWithLMHead\n"


def training_env() -> dict[str, str]:
    import os

    return {**os.environ, "VERL_PLATFORM": "cpu"}
