# SPDX-License-Identifier: Apache-2.0
"""The plan's memory lines: what each setting of a run changes, and a warning for what does not fit."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.config.batch import BatchPlan
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import make_plan
from embedrl_verl.plan.memory import CONTEXT, GIB, Stage, memory_stages
from embedrl_verl.platforms.footprint import Megatron, shape_of
from recipes.tiny_digits.models import build_tiny_model
from tests.config.runs import run_config
from tests.recipes.test_gpu_recipes import FSDP, MEGATRON, command_of

REASONER, EMBEDDER = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-Embedding-2B"
RECIPE = "run_egrl_qwen3vl.sh"
TRAINED = ("embedrl.embedder.train.enable=True",)
LORA = ("embedrl.embedder.train.lora_rank=16", "embedrl.embedder.train.lora_alpha=32")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(overrides, recipe, its variables) -> the configuration, with the recipe's default models and GPUs."""
    command = cache(lambda name, variables: command_of(tmp_path_factory.mktemp("recipe"), name, **dict(variables))[2:])

    def config(*overrides: str, name: str = RECIPE, **variables: str) -> Any:
        config = run_config(*command(name, tuple(sorted(variables.items()))), *overrides)
        config.trainer.device = "cuda"
        return config

    return config


@pytest.fixture
def stages(recipe: Any) -> Any:
    """As `recipe`, for GPUs of `gib` -> {name: stage}."""

    def of(*overrides: str, gib: float = 80, **variables: str) -> dict[str, Stage]:
        config = recipe(*overrides, **variables)
        found = memory_stages(config, BatchPlan.of(config), load_embedrl_config(config), gib * GIB)
        assert len({stage.name for stage in found}) == len(found)
        return {stage.name: stage for stage in found}

    return of


@pytest.mark.parametrize("nodes", ["1", "4"])
@pytest.mark.parametrize("name", [*FSDP, *MEGATRON])
def test_every_recipe_fits_eight_gpus_of_80_gib_and_its_plan_says_so(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, name: str, nodes: str
) -> None:
    monkeypatch.setenv("GPU_MEMORY", "80")
    plan = str(make_plan(recipe(name=name, NNODES=nodes)))
    for stage in ("rollout", "vectors", "log-probs", "reference", "update"):
        assert f"  {stage:<10} " in plan
    assert re.search(r"fits: at most [5-8]\d% of a GPU", plan) and "warning" not in plan


def test_what_does_not_fit_is_named_with_what_to_change(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_MEMORY", "40")
    plan = str(make_plan(recipe()))
    assert "rollout may need 41 of 40 GiB, which is above 90%: lower actor_rollout_ref.rollout.gpu_" in plan
    assert "update may need 58 of 40 GiB, which is above 90%: more GPUs, or fewer tokens" in plan
    assert "is 32768 and must hold a row of 16384" in plan
    assert "fits" not in plan


def test_no_remedy_is_named_that_is_in_force_or_without_effect(stages: Any) -> None:
    plain, offloaded = stages(gib=24), stages(gib=24, OFFLOAD="True")
    for name in ("rollout", "log-probs", "reference"):
        assert "OFFLOAD=True" in plain[name].remedy and "OFFLOAD=True" not in offloaded[name].remedy, name
    assert plain["update"].total == offloaded["update"].total and "OFFLOAD" not in plain["update"].remedy


@pytest.mark.parametrize("value", ["0", "-1", "80GB", "nan"])
def test_a_memory_that_is_no_number_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GPU_MEMORY", value)
    with pytest.raises(ConfigError, match=f"GPU_MEMORY must be the memory of one GPU in GiB, e.g. 80; got '{value}'"):
        make_plan(recipe())


def test_an_unknown_model_has_no_estimate_and_the_cpu_none_either(recipe: Any) -> None:
    config = recipe(MODEL_PATH="somebody/unknown")
    assert "not estimated: somebody/unknown is not here" in str(make_plan(config))
    config.trainer.device = "cpu"
    assert "memory" not in str(make_plan(config))
    plan = str(make_plan(recipe(EMBEDDER_PATH="/models/embedder")))
    assert "vectors: not estimated: /models/embedder is not here" in plan and "  update  " in plan


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"model_type": "bert"}',
        '{"model_type": "qwen3_vl", "text_config": {"num_attention_heads": 0}}',
        '{"model_type": "qwen2_vl", "vision_config": {"depth": 0}}',
        '{"model_type": "qwen2_vl", "vision_config": {"in_channels": null}}',
        '{"model_type": "mine", "auto_map": {"AutoConfig": "conf.Mine"}}',
    ],
)
def test_a_configuration_that_is_no_models_stops_no_plan_and_runs_no_code(
    stages: Any, tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    judge = stages(JUDGE_PATH=str(tmp_path))["judge"]
    assert "no Qwen-VL model that transformers can make" in judge.note and judge.total > 0
    assert not (tmp_path / "ran").exists()


def test_a_local_folder_is_measured_by_its_own_configuration_without_the_attention_it_names(
    stages: Any, tmp_path: Path
) -> None:
    """verl's checkpoints keep the run's attention, which may not be installed here."""
    folder, same = (build_tiny_model(tmp_path / name, family="qwen3_vl") for name in ("tiny", "same"))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_attn_implementation": "flash_attention_2"}))
    shape = shape_of(str(folder))
    assert shape == shape_of(str(same))
    assert stages(MODEL_PATH=str(folder))["update"].parts["Adam"] == 8 * shape.parameters // 8


def test_stages_follow_the_settings_of_a_run(stages: Any) -> None:
    plain = stages()
    assert plain["rollout"].parts["vLLM"] == pytest.approx(0.6 * 80 * GIB)
    assert plain["rollout"].parts["at rest"] == pytest.approx(12 * shape_of(REASONER).parameters / 8, rel=1e-6)

    offloaded = stages(OFFLOAD="True")
    assert offloaded["rollout"].parts["at rest"] == 0
    assert offloaded["update"].total == plain["update"].total

    whole = stages("actor_rollout_ref.model.use_fused_kernels=False")
    for stage in ("update", "log-probs"):
        assert whole[stage].total - plain[stage].total > 20 * GIB
    assert plain["log-probs"].parts["Adam"] == plain["update"].parts["Adam"]  # it stays where nothing is offloaded
    assert offloaded["log-probs"].parts["Adam"] == 0

    two = "actor_rollout_ref.actor.fsdp_config.fsdp_size"
    assert stages(f"{two}=64") == plain
    weights = stages(f"{two}=2")["update"].parts["weights"]
    assert weights == pytest.approx(4 * plain["update"].parts["weights"], rel=1e-6)

    for section in ("actor", "actor.fsdp_config"):  # of verl's two keys
        split = f"actor_rollout_ref.{section}.ulysses_sequence_parallel_size=4"
        pictures = stages(split, ATTENTION="flash_attention_2")
        assert pictures["log-probs"].parts["pass"] > 2 * plain["log-probs"].parts["pass"]  # every rank runs all of them

    no_kl = "actor_rollout_ref.actor.use_kl_loss=False"
    lora = ["actor_rollout_ref.model.lora_rank=16", "actor_rollout_ref.model.lora_alpha=32"]
    assert "reference" not in stages(no_kl) and "reference" not in stages(*lora)
    assert "reference" in stages(no_kl, "algorithm.use_kl_in_reward=True")

    trained, adapter = stages(*TRAINED), stages(*TRAINED, *LORA)
    assert trained["co-training"].parts["Adam"] == pytest.approx(8 * shape_of(EMBEDDER).parameters / 8, rel=1e-6)
    assert 0 < adapter["co-training"].parts["Adam"] < trained["co-training"].parts["Adam"] / 20
    assert "co-training" not in plain


def test_every_device_kind_has_its_own_stages(stages: Any) -> None:
    apart = stages(MODE="separate_async", GPUS_PER_NODE="4", ROLLOUT_GPUS_PER_NODE="4")
    assert apart["rollout"].device == "rollout GPU" and list(apart["rollout"].parts) == ["vLLM", "CUDA"]
    judged = stages(JUDGE_PATH=REASONER)
    assert judged["judge"].device == "training GPU" and judged["judge"].parts["at rest"] > 0
    own = stages(JUDGE_PATH=REASONER, JUDGE_GPUS_PER_NODE="2")
    assert own["judge"].device == "judge's GPU" and list(own["judge"].parts) == ["vLLM", "CUDA"]
    assert judged["update"].parts["CUDA"] - own["update"].parts["CUDA"] == CONTEXT  # its sleeping engine's
    pool = stages("embedrl.embedder.n_gpus_per_node=2")
    assert pool["vectors"].device == "Embedder's GPU" and pool["vectors"].parts["actor at rest"] == 0


def test_an_engine_without_room_for_one_row_is_warned_of(
    recipe: Any, stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = stages(gib=32)["rollout"].short
    assert "a row of 16384 tokens needs 2.2: raise actor_rollout_ref.rollout.gpu_memory_utilization or tensor" in short
    assert not stages(gib=32, ROLLOUT_TP="4")["rollout"].short
    monkeypatch.setenv("GPU_MEMORY", "80")
    plan = str(make_plan(recipe("actor_rollout_ref.rollout.gpu_memory_utilization=0.2")))
    assert "warning" in plan and "rollout cannot work: 0.0 GiB are left for the KV cache" in plan and "fits" not in plan


@pytest.mark.parametrize("key", ["rollout.gpu_memory_utilization", "ref.log_prob_max_token_len_per_gpu"])
def test_a_null_where_a_number_is_needed_is_refused(recipe: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"actor_rollout_ref.{key} must be a number; got null"):
        make_plan(recipe(f"actor_rollout_ref.{key}=null"))


def test_settings_that_are_not_counted_are_named(recipe: Any) -> None:
    key = "actor_rollout_ref.rollout.free_cache_engine"
    plan = str(make_plan(recipe(f"{key}=False", ATTENTION="sdpa")))
    assert f"not in these figures: {key}=False" in plan and "rows are padded (attention=sdpa)" in plan


def test_experts_are_split_apart_from_the_rest(tmp_path: Path) -> None:
    text = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    text |= {"vocab_size": 1024, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    vision = {"depth": 2, "hidden_size": 128, "out_hidden_size": 256, "intermediate_size": 256, "num_heads": 2}
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "vision_config": {**vision, "deepstack_visual_indexes": [0]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert shape.experts == 2 * 16 * 3 * 256 * 128 and shape.ffn == 2 * 128
    split = Megatron(shape, tensor=2, pipeline=1, ranks=16, trained=True, expert=8)
    dense = shape.parameters - shape.experts
    assert split.weights == 2 * (dense // 2 + shape.experts // 16)
    assert split.optimizer == pytest.approx(12 * (dense / 2 / 8 + shape.experts / 16), abs=12)
