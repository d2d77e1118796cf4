# SPDX-License-Identifier: Apache-2.0
"""The GPU recipes: their plans on simulated machines, what they pass on, and what they refuse.

A recipe is run with a stand-in for Python; what it was called with is then planned in this process, which has verl
imported already. One recipe is also run as a person runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import Plan, make_plan
from tests.recipes.calls import ROOT, Recipe, modules_of

FSDP = ("run_egrl_qwen2vl.sh", "run_egrl_qwen2_5vl.sh", "run_egrl_qwen3vl.sh")
MEGATRON = ("run_egrl_qwen2_5vl_megatron.sh", "run_egrl_qwen3vl_megatron.sh")
SHAPES = {"1 GPU": (1, 1), "8 GPUs": (1, 8), "4 x 8 GPUs": (4, 8)}


def command_of(tmp_path: Path, name: str, *arguments: str, **variables: str) -> list[str]:
    """The arguments that a recipe's dry run gives to Python."""
    recipe = Recipe(tmp_path, name)
    code, calls = recipe.run(*arguments, DRY_RUN="1", **variables)
    assert code == 0 and len(calls) == 1, recipe.said
    assert calls[0][:2] == ["-m", "embedrl_verl.plan"]
    return calls[0]


def config_of(tmp_path: Path, name: str, *arguments: str, **variables: str) -> DictConfig:
    return compose(command_of(tmp_path, name, *arguments, **variables)[2:])


def plan_of(tmp_path: Path, name: str, *arguments: str, **variables: str) -> Plan:
    return make_plan(config_of(tmp_path, name, *arguments, **variables))


def path_with_gpus(tmp_path: Path, count: int) -> str:
    """A PATH whose nvidia-smi lists so many GPUs."""
    fake = tmp_path / f"bin{count}" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/usr/bin/env bash\n" + "".join(f"echo 'GPU {number}: one'\n" for number in range(count)))
    fake.chmod(0o755)
    return f"{fake.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*FSDP, *MEGATRON])
def test_the_plan_of_every_recipe_has_the_papers_batch_on_any_machine(tmp_path: Path, name: str, shape: str) -> None:
    nodes, gpus = SHAPES[shape]
    plan = plan_of(tmp_path, name, NNODES=str(nodes), GPUS_PER_NODE=str(gpus))
    batch = plan.batch
    assert (batch.pairs, batch.rollouts, batch.rows, batch.updates) == (32, 8, 512, 2)
    assert batch.devices == nodes * gpus
    split = 4 if name in MEGATRON and batch.devices >= 4 else 1
    assert batch.data_parallel == batch.devices // split
    text = str(plan)
    assert f"{nodes} x {gpus} = {nodes * gpus} GPUs" in text
    assert "lr 3e-06, clip 0.2, KL loss 0.01 (low_var_kl), temperature 1.0" in text
    assert "prompt up to 14336, response up to 2048" in text
    assert ("Megatron, TP" if name in MEGATRON else "fsdp2, ") in text


def test_knobs_and_overrides_reach_the_plan_and_the_command_line_wins(tmp_path: Path) -> None:
    knobs = {"MODEL_PATH": "/models/my reasoner", "EMBEDDER_PATH": "/models/emb", "MEDIA_ROOT": "/data/media"}
    files = {"TRAIN_FILES": "/data/a.parquet,/data/b c.parquet", "VAL_FILES": "/data/v.parquet"}
    arguments = ("actor_rollout_ref.rollout.n=4", "data.embedrl.family=qwen2_vl")
    config = config_of(tmp_path, FSDP[0], *arguments, PAIRS="16", G="2", LR=".5", STEPS="70", **knobs, **files)
    assert config.actor_rollout_ref.model.path == knobs["MODEL_PATH"]
    assert config.embedrl.embedder.path == knobs["EMBEDDER_PATH"]
    assert config.data.media_root == knobs["MEDIA_ROOT"]
    assert list(config.data.train_files) == ["/data/a.parquet", "/data/b c.parquet"]
    assert make_plan(config).batch.rows == 16 * 2 * 4
    assert config.trainer.total_training_steps == 70 and config.embedrl.embedder.profile == "auto"
    assert config.actor_rollout_ref.actor.optim.lr == 0.5 and config.trainer.max_actor_ckpt_to_keep == 2


@pytest.mark.parametrize(
    ("variables", "profile"),
    [
        ({}, "qwen3_vl_embedding"),
        ({"EMBEDDER_PATH": "Qwen/Qwen3-VL-Embedding-2B"}, "qwen3_vl_embedding"),
        ({"EMBEDDER_PATH": "Qwen/Qwen3-VL-Embedding-8B"}, "qwen3_vl_embedding"),
        ({"EMBEDDER_PROFILE": "gme"}, "gme"),
        ({"EMBEDDER_PATH": "other/model"}, "auto"),
    ],
)
def test_the_embedders_profile_follows_its_path(tmp_path: Path, variables: dict[str, str], profile: str) -> None:
    assert config_of(tmp_path, FSDP[0], **variables).embedrl.embedder.profile == profile


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_recipes_train_actor_and_reference_with_verls_engine_recompute_and_offload(tmp_path, name):
    config = config_of(tmp_path, name)
    actor = config.actor_rollout_ref.actor
    for section in (actor, config.actor_rollout_ref.ref):
        assert section.strategy == "megatron" and "McoreEngineConfig" in section.megatron._target_
    assert actor.optim.clip_grad == 1.0 and config.embedrl.embedder.strategy == "fsdp2"
    recompute = actor.megatron.override_transformer_config
    assert (recompute.recompute_granularity, recompute.recompute_method) == ("full", "uniform")
    assert recompute.recompute_num_layers == 1 and actor.megatron.param_offload and actor.megatron.optimizer_offload


def test_there_is_no_megatron_recipe_for_qwen2_vl_and_asking_for_it_is_refused(tmp_path: Path) -> None:
    assert not list((ROOT / "recipes").glob("*qwen2vl_megatron*"))
    with pytest.raises(ConfigError, match="Megatron engine can load .*; got qwen2_vl"):
        plan_of(tmp_path, MEGATRON[0], "data.embedrl.family=qwen2_vl")


@pytest.mark.parametrize("name", [*FSDP, *MEGATRON])
def test_without_a_gpu_a_recipe_says_so_and_names_the_cpu_recipe(tmp_path: Path, name: str) -> None:
    recipe = Recipe(tmp_path, name)
    assert recipe.run(PATH=path_with_gpus(tmp_path, 0)) == (4, [])
    assert "needs NVIDIA GPUs and this machine has none" in recipe.said
    assert "bash recipes/run_egrl_tiny_cpu.sh" in recipe.said


@pytest.mark.parametrize(
    ("gpus", "variables", "code", "messages"),
    [
        (1, {}, 4, ["GPUS_PER_NODE=8, but this machine has 1 GPU(s); set GPUS_PER_NODE=1"]),
        (1, {"NNODES": "2", "GPUS_PER_NODE": "1"}, 2, ["RAY_ADDRESS", "NODE_RANK=0..1"]),
        (
            1,
            {"NNODES": "2", "GPUS_PER_NODE": "1", "NODE_RANK": "0", "MASTER_ADDR": "192.0.2.1"},
            2,
            ["set RAY_AUTH_TOKEN to the same secret on every node"],
        ),
        (
            2,
            {"MODE": "separate_async", "GPUS_PER_NODE": "2", "ROLLOUT_GPUS_PER_NODE": "1"},
            4,
            ["GPUS_PER_NODE + ROLLOUT_GPUS_PER_NODE = 2 + 1 = 3, but this machine has 2"],
        ),
        (
            2,
            {"MODE": "separate_async", "GPUS_PER_NODE": "2", "ROLLOUT_NNODES": "2"},
            2,
            ["MODE=separate_async on several nodes needs a Ray cluster"],
        ),
    ],
)
def test_a_machine_or_cluster_that_does_not_suffice_is_refused_with_the_way_out(
    tmp_path, gpus, variables, code, messages
):
    recipe = Recipe(tmp_path, FSDP[0])
    assert recipe.run(PATH=path_with_gpus(tmp_path, gpus), **variables) == (code, [])
    assert all(message in recipe.said for message in messages)


def test_a_dry_run_as_a_person_runs_it_prints_the_plan(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, FSDP[0])
    assert recipe.run(DRY_RUN="1", NNODES="4", PYTHON=sys.executable)[0] == 0, recipe.said
    assert "32 pairs x 2 sides = 64 prompts, x 8 rollouts = 512 rows a step" in recipe.said


@pytest.mark.parametrize("given", [True, False])
def test_a_dry_run_sets_up_an_environment_only_where_none_is_named_and_says_so(tmp_path: Path, given: bool) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("tiny_digits"))
    python = tmp_path / "bin" / "python3"  # neither verl nor this package
    for file, text in (
        (tmp_path / "scripts" / "setup_env.sh", "mkdir -p .venv/bin\ncp bin/made .venv/bin/python\n"),
        (python, "#!/bin/sh\nexit 1\n"),
        (tmp_path / "bin" / "made", "#!/bin/sh\necho planned\n"),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    env = {"PATH": f"{python.parent}:/usr/bin:/bin", "DRY_RUN": "1", **({"PYTHON": "bin/made"} if given else {})}
    done = subprocess.run(
        ["bash", "recipes/run_egrl_qwen2vl.sh"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("planned\n"), done.stderr
    assert (tmp_path / ".venv").exists() == (".venv is set up first" in done.stdout) == (not given)


def test_devices_that_the_batch_does_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one update has ppo_mini_batch_size x rollout.n = 32 x 8 = 256 rows"):
        plan_of(tmp_path, FSDP[0], NNODES="3")


@pytest.mark.parametrize("name", [FSDP[2], MEGATRON[1]])
@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_asynchronous_modes_are_planned_and_named(tmp_path: Path, name: str, mode: str) -> None:
    knobs = {"MODE": mode, "GPUS_PER_NODE": "4", "ROLLOUT_GPUS_PER_NODE": "2", "ROLLOUT_NNODES": "3"}
    config = config_of(tmp_path, name, **knobs)
    text = str(make_plan(config))
    assert config.trainer.v1.trainer_mode == f"egrl_{mode}"
    assert f"egrl_{mode}, staleness at 8: drop" in text
    separate = "6 replicas of 1 GPU, on 6 GPUs of its own" in text and "for training, 6 for rollouts: 10 in all" in text
    assert separate == (mode == "separate_async")


def test_the_rollouts_own_gpus_need_not_fit_those_of_training(tmp_path: Path) -> None:
    knobs = {"MODE": "separate_async", "GPUS_PER_NODE": "1", "ROLLOUT_GPUS_PER_NODE": "4", "ROLLOUT_TP": "4"}
    assert "1 replica of 4 GPUs, on 4 GPUs of its own" in str(plan_of(tmp_path, FSDP[2], **knobs))


@pytest.mark.parametrize(("mode", "offload"), [("sync", False), ("colocate_async", False), ("separate_async", True)])
def test_offload_follows_the_mode_unless_it_is_set(tmp_path: Path, mode: str, offload: bool) -> None:
    for variables, expected in (({}, offload), ({"OFFLOAD": str(not offload)}, not offload)):
        config = config_of(tmp_path, FSDP[0], MODE=mode, **variables)
        assert config.actor_rollout_ref.actor.fsdp_config.param_offload is expected


@pytest.mark.parametrize("attention", ["torch_varlen", "flash_attention_2", "sdpa"])
def test_one_setting_chooses_the_attention_of_actor_reference_and_embedder(tmp_path: Path, attention: str) -> None:
    config = config_of(tmp_path, FSDP[0], ATTENTION=attention)
    model = config.actor_rollout_ref.model
    assert model.override_config.attn_implementation == config.embedrl.embedder.attn_implementation == attention
    assert model.use_remove_padding is (attention != "sdpa")


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("PAIRS=x", "PAIRS must be a whole number from 1; got x"),
        ("STEPS=x", "STEPS must be a whole number from 1; got x"),
        ("JUDGE_TP=0", "JUDGE_TP must be a whole number from 1; got 0"),
        ("JUDGE_GPUS_PER_NODE=two", "JUDGE_GPUS_PER_NODE must be a whole number from 0; got two"),
        ("GPUS_PER_NODE=0", "GPUS_PER_NODE must be a whole number from 1; got 0"),
        ("LR=abc", "LR must be a number of 0 or more; got abc"),
        ("KL=-1", "KL must be a number of 0 or more; got -1"),
        ("MODE=async", "MODE must be sync, colocate_async or separate_async; got async"),
        ("OFFLOAD=yes", "OFFLOAD must be True or False; got yes"),
        ("ATTENTION=flash", "ATTENTION must be torch_varlen, flash_attention_2 or sdpa; got flash"),
    ],
)
def test_a_knob_that_is_no_number_is_refused(tmp_path: Path, knob: str, message: str) -> None:
    """Or that is none of its choices."""
    recipe, (name, value) = Recipe(tmp_path, FSDP[1]), knob.split("=")
    assert recipe.run(DRY_RUN="1", **{name: value}) == (2, [])
    assert message in recipe.said


@pytest.mark.parametrize("value", ["3e-6", "1", "0.01", ".5", "1E-3"])
def test_numbers_may_be_written_as_usual(tmp_path: Path, value: str) -> None:
    assert f"actor_rollout_ref.actor.optim.lr={value}" in command_of(tmp_path, FSDP[0], LR=value)


def earlier_run(recipe: Recipe, *, checkpoint: bool) -> None:
    (recipe.out / "rollouts").mkdir(parents=True)
    (recipe.out / "metrics.jsonl").write_text("of the first run")
    (recipe.out / "checkpoints").mkdir()
    if checkpoint:
        (recipe.out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("50")


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "moved"),
    [
        (False, [], True),
        (True, [], False),
        (True, ["trainer.resume_mode=disable"], True),
        (True, ["++trainer.resume_mode='disable'"], True),
        (True, ["trainer.resume_mode=disable", "trainer.resume_mode=auto"], False),
        (True, ["trainer.default_local_dir=/elsewhere"], True),
        (False, ["trainer.resume_mode=resume_path", "trainer.resume_from_path=/c/global_step_5"], False),
    ],
)
def test_a_run_that_starts_anew_moves_an_earlier_ones_files_aside(tmp_path, checkpoint, arguments, moved):
    recipe = Recipe(tmp_path, FSDP[0])
    earlier_run(recipe, checkpoint=checkpoint)
    assert recipe.modules(*arguments, RAY_ADDRESS="none") == (["plan", "train"] if moved else ["train"])
    found = {path.name for path in (recipe.out / "old-1").glob("*")}
    assert found == ({"metrics.jsonl", "rollouts", "checkpoints"} if moved else set())
    assert (recipe.out / "metrics.jsonl").is_file() is not moved


def test_nothing_of_an_earlier_run_is_moved_for_settings_that_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, FSDP[0])
    earlier_run(recipe, checkpoint=False)
    code, calls = recipe.run(RAY_ADDRESS="none", FAIL="plan")
    assert (code, modules_of(calls)) == (1, ["plan"])
    assert (recipe.out / "metrics.jsonl").is_file() and not (recipe.out / "old-1").exists()


def test_a_first_run_moves_nothing(tmp_path: Path) -> None:
    assert Recipe(tmp_path, FSDP[0]).modules(RAY_ADDRESS="none") == ["train"]
