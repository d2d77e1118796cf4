# SPDX-License-Identifier: Apache-2.0
"""The stage 1 recipes: what they pass on is a valid configuration, on one node and on several."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.stage1.settings import Stage1Config, load_stage1_config
from tests.recipes.calls import Recipe, modules_of
from tests.recipes.test_gpu_recipes import path_with_gpus

STAGE_1 = "embedrl_verl.stage1"


@pytest.fixture
def gpu(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path, "run_embedder_contrastive.sh")


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path, "run_embedder_tiny_cpu.sh")


def config_of(call: list[str]) -> Stage1Config:
    """The checked configuration of a call of `embedrl_verl.stage1`."""
    return load_stage1_config(compose(call[call.index(STAGE_1) + 1 :], "embedder_trainer"))


def test_a_dry_run_passes_the_settings_on_and_needs_no_gpu(gpu: Recipe) -> None:
    knobs = {"TRAIN_FILES": "a b.parquet,c.parquet", "PAIRS": "64", "SUB_PAIRS": "32", "LORA_RANK": "8"}
    code, [call] = gpu.run("contrastive.seed=5", DRY_RUN="1", TCOT="False", **knobs)
    config = config_of(call)
    assert code == 0 and config.data.train_files == ("a b.parquet", "c.parquet") and not config.data.tcot
    assert (config.contrastive.batch_pairs, config.contrastive.sub_batch_pairs, config.contrastive.seed) == (64, 32, 5)
    assert (config.embedder.train.lora_rank, config.embedder.train.lora_alpha) == (8, 16)


@pytest.mark.parametrize("knob", ["PAIRS=x", "SUB_PAIRS=0", "LORA_RANK=-1", "EPOCHS=two", "LR=abc"])
def test_a_knob_that_is_no_number_is_refused(gpu: Recipe, knob: str) -> None:
    name, value = knob.split("=")
    assert gpu.run(DRY_RUN="1", **{name: value}) == (2, [])
    assert f"{name} must be a " in gpu.said and gpu.said.endswith(f"; got {value}\n")


@pytest.mark.parametrize("path", ["/gone", "./gone", "../gone"])
def test_a_model_folder_that_is_not_there_is_refused_before_anything_is_made(gpu: Recipe, path: str) -> None:
    assert gpu.run(MODEL_PATH=path, RAY_ADDRESS="none") == (2, [])
    assert gpu.said.endswith(f"there is no folder {path}\n") and not gpu.out.exists()


@pytest.mark.parametrize("has_emb", [False, True])
def test_a_model_without_the_token_gets_a_copy_first_and_the_result_is_exported(gpu, tmp_path, has_emb):
    variables = {"GPUS_PER_NODE": "2", "MODEL_PATH": "some/model", "HAS_EMB": str(int(has_emb))}
    code, calls = gpu.run(PATH=path_with_gpus(tmp_path, 2), **variables)
    assert code == 0, gpu.said
    assert modules_of(calls) == ["cli"] * (not has_emb) + ["run", "cli"]
    train = next(call for call in calls if STAGE_1 in call)
    assert train[:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert config_of(train).embedder.path == ("some/model" if has_emb else f"{gpu.out}/base")
    assert calls[-1][2:5] == ["export", f"{gpu.out}/checkpoints/global_step_7", "--kind"]


def test_several_nodes_need_to_know_each_other(gpu: Recipe) -> None:
    several = {"NNODES": "2", "RAY_ADDRESS": "none", "HAS_EMB": "1"}  # the address: to pass without GPUs here
    assert gpu.run(**several) == (2, []) and "NODE_RANK=0..1 and MASTER_ADDR" in gpu.said
    code, calls = gpu.run(**several, NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert code == 0 and modules_of(calls) == ["run"], "only the first node exports"
    assert calls[-1][4:10] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]


def test_another_family_or_seed_does_not_train_the_models_of_an_earlier_one(tiny: Recipe) -> None:
    assert tiny.run()[0] == 0
    assert tiny.run(FAMILY="qwen3_vl") == (2, [])
    assert "FAMILY and SEED 'qwen2_vl 0', not 'qwen3_vl 0'" in tiny.said


def test_the_tiny_recipe_trains_two_that_differ_in_the_input_alone(tiny: Recipe) -> None:
    code, calls = tiny.run(SEED="3", STEPS="7")
    assert code == 0, tiny.said
    first, second = (config_of(call) for call in calls if STAGE_1 in call)
    assert {first.data.tcot, second.data.tcot} == {True, False} and first.embedder == second.embedder
    assert first.contrastive.total_steps == 7 and first.contrastive.seed == second.contrastive.seed == 3
    assert modules_of(calls)[-1] == "stage1_table"
