# SPDX-License-Identifier: Apache-2.0
"""Builds what verl builds on GPUs from a run's configuration, against a made-up H100: `test_rehearsal.py` runs it.

`python tests/recipes/rehearsal.py RUNS OUT`: RUNS is a JSON list of {"name", "overrides", "judge"}, OUT the JSON
{name: {"actor": ..., "rollout": ..., ...}} of what came out. A process of its own, because vLLM chooses its platform
once.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf


def pretend_h100() -> None:
    """vLLM's CUDA platform without its kernels and without a device."""
    kernels = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C")
    for name in (*kernels, "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    for name in (
        "scaled_mm_supports_fp8",
        "scaled_mm_supports_block_fp8",
        "scaled_mm_supports_fp4",
        "group_gemm_supported",
    ):
        setattr(torch.ops._C, f"cutlass_{name}", lambda *_: False)
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):
        """Compute capability 9.0 and 80 GB."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 1024**3

        @classmethod
        def device_count(cls) -> int:
            return 8

        def is_cumem_allocator_available(self) -> bool:
            return True

        @classmethod
        def is_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            return capability in (90, (9, 0))

    platforms._current_platform = H100()


_ENGINES: dict[str, dict[str, Any]] = {}


def engine_of(rollout: Any, model: Any, gpus: int) -> dict[str, Any]:
    """What vLLM makes of the arguments of verl's server for a rollout section; made once for equal sections."""
    key = f"{OmegaConf.to_yaml(rollout, resolve=True)}{OmegaConf.to_yaml(model, resolve=True)}{gpus}"
    if key not in _ENGINES:
        _ENGINES[key] = _make_engine(rollout, model, gpus)
    return _ENGINES[key]


def _make_engine(rollout: Any, model: Any, gpus: int) -> dict[str, Any]:
    import ray
    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
    from vllm.engine.arg_utils import AsyncEngineArgs

    ray.get_runtime_context = lambda: types.SimpleNamespace(get_job_id=lambda: "01000000")
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    made: dict[str, Any] = {}

    class Server(vLLMHttpServer):  # type: ignore[misc]
        async def run_server(self, args: Any) -> None:
            config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
            made.update(
                model=config.model_config.architecture,
                dtype=str(config.model_config.dtype),
                max_model_len=config.model_config.max_model_len,
                parallel=config.parallel_config.tensor_parallel_size,
                device=config.device_config.device_type,
                sleep=config.model_config.enable_sleep_mode,
                extension=config.parallel_config.worker_extension_cls,
            )

    server = Server(rollout, model, RolloutMode.HYBRID, [], 0, 0, gpus, 1, "0")
    asyncio.run(server.launch_server())
    return made


class _Made(Exception):
    """Carries the configuration that verl's hybrid worker gives to the worker of a role."""


class _Recorder:
    def __init__(self, config: Any) -> None:
        raise _Made(config)


def training_config(config: Any, role: str) -> Any:
    """verl's TrainingWorkerConfig of `actor` or `ref`, by the code that a GPU worker runs up to the engine."""
    from embedrl_verl.platforms.training_worker import EmbedRLActorRolloutRefWorker

    worker = object.__new__(EmbedRLActorRolloutRefWorker)
    worker.__dict__.update(
        config=copy.deepcopy(config.actor_rollout_ref),
        role=role,
        distillation_enabled=False,
        _omega_profiler_config=None,
        actor_worker_cls=_Recorder,
        ref_worker_cls=_Recorder,
    )
    try:
        worker.init_model()
    except _Made as made:
        return made.args[0]
    raise AssertionError(f"{role} has no worker")


def rehearse(overrides: list[str], *, judge: bool) -> dict[str, Any]:
    """Validated configuration, then each role's dataclasses and engines' arguments."""
    from embedrl_verl.config import load_embedrl_config
    from embedrl_verl.config.compose import bound_served_lengths, compose
    from embedrl_verl.embedder.worker import worker_config
    from embedrl_verl.plan import make_plan

    config = compose(overrides)
    config.trainer.device = "cuda"
    make_plan(config)
    bound_served_lengths(config)
    section = config.actor_rollout_ref
    actor, reference = training_config(config, "actor"), training_config(config, "ref")
    gpus = int(config.trainer.n_gpus_per_node)
    embedder = worker_config(load_embedrl_config(config).embedder, ranks_per_node=gpus)
    made = {
        "actor": {
            "engine": type(actor.engine_config).__name__,
            "offload": actor.engine_config.param_offload,
            "attention": actor.model_config.hf_config._attn_implementation,
            "packed": actor.engine_config.use_remove_padding,
            "fused": actor.model_config.use_fused_kernels,
        },
        "reference": {
            "engine": type(reference.engine_config).__name__,
            "forward_only": reference.engine_config.forward_only,
            "packed": reference.engine_config.use_remove_padding,
        },
        "embedder": {
            "engine": type(embedder.engine_config).__name__,
            "attention": embedder.model_config.hf_config._attn_implementation,
            "no_sync": embedder.engine_config.use_no_sync_for_gradient_accumulation,
        },
        "rollout": engine_of(section.rollout, section.model, gpus),
    }
    if judge:
        model_of_judge = compose([*overrides, f"actor_rollout_ref.model.path={config.reward.reward_model.model_path}"])
        made["judge"] = engine_of(config.reward.reward_model.rollout, model_of_judge.actor_rollout_ref.model, gpus)
    return made


def main(runs: str, out: str) -> None:
    """Command line of the module docstring."""
    torch.cuda.is_bf16_supported = lambda *_: True
    pretend_h100()
    result = {run["name"]: rehearse(run["overrides"], judge=run["judge"]) for run in json.loads(Path(runs).read_text())}
    Path(out).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
