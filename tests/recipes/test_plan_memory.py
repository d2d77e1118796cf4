# SPDX-License-Identifier: Apache-2.0
"""The plan's memory lines: what each setting of a run changes, and a warning for what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import _batch_plan, compose, make_plan
from embedrl_verl.plan_memory import GIB, Stage, memory_stages
from embedrl_verl.platforms.footprint import shape_of
from embedrl_verl.tiny.models import build_tiny_model
from tests.recipes.test_gpu_recipes import FSDP, MEGATRON, command_of

REASONER, EMBEDDER = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-Embedding-2B"


def overrides_of(folder: Path, recipe: str = "run_egrl_qwen3vl.sh", *more: str, **variables: str) -> list[str]:
    """Of a recipe with its default models, whose families nothing has to be looked up for."""
    return [*command_of(folder, recipe, **variables)[2:], *more]


def stages_of(overrides: list[str], gib: float = 80) -> dict[str, Stage]:
    config = compose(overrides)
    found = memory_stages(config, _batch_plan(config), load_embedrl_config(config), gib * GIB)
    assert len({stage.name for stage in found}) == len(found)
    return {stage.name: stage for stage in found}


@pytest.mark.parametrize("nodes", ["1", "4"])
@pytest.mark.parametrize("recipe", [*FSDP, *MEGATRON])
def test_every_recipe_fits_eight_gpus_of_80_gib_and_its_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, nodes: str
) -> None:
    monkeypatch.setenv("GPU_MEMORY", "80")
    config = compose(overrides_of(tmp_path, recipe, NNODES=nodes))
    config.trainer.device = "cuda"
    plan = str(make_plan(config))
    for name in ("rollout", "vectors", "log-probs", "reference", "update"):
        assert f"  {name:<10} " in plan
    assert "fits: no stage is above 95% of a GPU" in plan and "warning" not in plan


def test_what_does_not_fit_is_named_with_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_MEMORY", "40")
    config = compose(overrides_of(tmp_path))
    config.trainer.device = "cuda"
    plan = str(make_plan(config))
    assert "update may need 5" in plan and "of 40 GiB: OFFLOAD=True, more GPUs" in plan
    assert "fits" not in plan


@pytest.mark.parametrize("value", ["0", "-1", "80GB", "nan"])
def test_a_memory_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GPU_MEMORY", value)
    config = compose(overrides_of(tmp_path))
    config.trainer.device = "cuda"
    with pytest.raises(ConfigError, match=f"GPU_MEMORY must be the memory of one GPU in GiB, e.g. 80; got '{value}'"):
        make_plan(config)


def test_an_unknown_model_has_no_estimate_and_the_cpu_none_either(tmp_path: Path) -> None:
    config = compose(overrides_of(tmp_path, MODEL_PATH="somebody/unknown"))
    config.trainer.device = "cuda"
    assert "not estimated: somebody/unknown cannot be read here" in str(make_plan(config))
    config.trainer.device = "cpu"
    assert "memory" not in str(make_plan(config))


def test_a_local_folder_is_measured_by_its_own_configuration(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "tiny", family="qwen3_vl")
    small = stages_of(overrides_of(tmp_path, MODEL_PATH=str(folder)))
    parameters = shape_of(str(folder)).parameters
    assert small["update"].parts["Adam"] == 8 * parameters // 8


def test_stages_follow_the_settings_of_a_run(tmp_path: Path) -> None:
    plain = stages_of(overrides_of(tmp_path))
    assert plain["rollout"].parts["vLLM"] == pytest.approx(0.6 * 80 * GIB)
    assert plain["rollout"].parts["at rest"] == pytest.approx(12 * shape_of(REASONER).parameters / 8, rel=1e-6)

    offloaded = stages_of(overrides_of(tmp_path, OFFLOAD="True"))
    assert offloaded["rollout"].parts["at rest"] == 0
    assert offloaded["update"].total == plain["update"].total

    whole = stages_of(overrides_of(tmp_path, "run_egrl_qwen3vl.sh", "actor_rollout_ref.model.use_fused_kernels=False"))
    assert whole["update"].total - plain["update"].total > 20 * GIB

    no_kl = stages_of(overrides_of(tmp_path, "run_egrl_qwen3vl.sh", "actor_rollout_ref.actor.use_kl_loss=False"))
    assert "reference" not in no_kl

    trained = stages_of(overrides_of(tmp_path, "run_egrl_qwen3vl.sh", "embedrl.embedder.train.enable=True"))
    adapter = stages_of(
        overrides_of(
            tmp_path,
            "run_egrl_qwen3vl.sh",
            "embedrl.embedder.train.enable=True",
            "embedrl.embedder.train.lora_rank=16",
            "embedrl.embedder.train.lora_alpha=32",
        )
    )
    assert trained["co-training"].parts["Adam"] == pytest.approx(8 * shape_of(EMBEDDER).parameters / 8, rel=1e-6)
    assert 0 < adapter["co-training"].parts["Adam"] < trained["co-training"].parts["Adam"] / 20
    assert "co-training" not in plain


def test_every_device_kind_has_its_own_stages(tmp_path: Path) -> None:
    apart = stages_of(overrides_of(tmp_path, MODE="separate_async", GPUS_PER_NODE="4", ROLLOUT_GPUS_PER_NODE="4"))
    assert apart["rollout"].device == "rollout GPU" and list(apart["rollout"].parts) == ["vLLM"]
    judged = stages_of(overrides_of(tmp_path, JUDGE_PATH=REASONER))
    assert judged["judge"].device == "training GPU" and judged["judge"].parts["at rest"] > 0
    own = stages_of(overrides_of(tmp_path, JUDGE_PATH=REASONER, JUDGE_GPUS_PER_NODE="2"))
    assert own["judge"].device == "judge's GPU" and list(own["judge"].parts) == ["vLLM"]
    pool = stages_of(overrides_of(tmp_path, "run_egrl_qwen3vl.sh", "embedrl.embedder.n_gpus_per_node=2"))
    assert pool["vectors"].device == "Embedder's GPU" and pool["vectors"].parts["actor at rest"] == 0


def test_an_engine_without_room_for_one_row_says_so(tmp_path: Path) -> None:
    assert "NO ROOM for one row of 16384 tokens" in stages_of(overrides_of(tmp_path), gib=32)["rollout"].note
    split = stages_of(overrides_of(tmp_path, ROLLOUT_TP="4"), gib=32)["rollout"]
    assert "rows of 16384 tokens" in split.note and "NO ROOM" not in split.note
