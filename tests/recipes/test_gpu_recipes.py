# SPDX-License-Identifier: Apache-2.0
"""The GPU recipes: their plans on simulated machines, what they pass on, and what they refuse.

A recipe is run with a stand-in for Python that writes down its arguments; those are then planned in this process, which
has verl imported already. One recipe is also run as a person runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import Plan, make_plan
from tests.recipes.calls import recorded, recording

ROOT = Path(__file__).resolve().parents[2]
FSDP = ("run_egrl_qwen2vl.sh", "run_egrl_qwen2_5vl.sh", "run_egrl_qwen3vl.sh")
MEGATRON = ("run_egrl_qwen2_5vl_megatron.sh", "run_egrl_qwen3vl_megatron.sh")
SHAPES = {"1 GPU": (1, 1), "8 GPUs": (1, 8), "4 x 8 GPUs": (4, 8)}


def run_recipe(
    name: str, *arguments: str, path: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a recipe with an environment that holds only what is named here (and PATH, HOME)."""
    env = {"PATH": path or os.environ["PATH"], "HOME": os.environ["HOME"], "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "recipes" / name), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def command_of(tmp_path: Path, name: str, *arguments: str, **variables: str) -> list[str]:
    """The arguments that a recipe's dry run gives to Python."""
    stand_in, written = tmp_path / "python", tmp_path / "arguments"
    stand_in.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >'{written}'\n")
    stand_in.chmod(0o755)
    result = run_recipe(name, *arguments, DRY_RUN="1", PYTHON=str(stand_in), **variables)
    assert result.returncode == 0, result.stderr
    return written.read_text().split("\0")[:-1]


def plan_of(tmp_path: Path, name: str, *arguments: str, **variables: str) -> Plan:
    command = command_of(tmp_path, name, *arguments, **variables)
    assert command[:2] == ["-m", "embedrl_verl.plan"]
    return make_plan(compose(command[2:]))


def no_gpu_path(tmp_path: Path) -> str:
    """A PATH whose nvidia-smi lists no GPU."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.write_text("#!/usr/bin/env bash\n")
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
    command = command_of(tmp_path, FSDP[0], "actor_rollout_ref.rollout.n=4", PAIRS="16", G="2", **knobs, **files)
    config = compose(command[2:])
    assert config.actor_rollout_ref.model.path == knobs["MODEL_PATH"]
    assert config.embedrl.embedder.path == knobs["EMBEDDER_PATH"]
    assert config.data.media_root == knobs["MEDIA_ROOT"]
    assert list(config.data.train_files) == ["/data/a.parquet", "/data/b c.parquet"]
    assert make_plan(config).batch.rows == 16 * 2 * 4


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_recipes_train_the_actor_and_the_reference_with_verls_megatron_engine(
    tmp_path: Path, name: str
) -> None:
    config = compose(command_of(tmp_path, name)[2:])
    for role in ("actor", "ref"):
        section = config.actor_rollout_ref[role]
        assert section.strategy == "megatron"
        assert "McoreEngineConfig" in section.megatron._target_
    assert config.actor_rollout_ref.actor.optim.clip_grad == 1.0
    assert config.embedrl.embedder.strategy == "fsdp2"


def test_there_is_no_megatron_recipe_for_qwen2_vl_and_asking_for_it_is_refused(tmp_path: Path) -> None:
    assert not list((ROOT / "recipes").glob("*qwen2vl_megatron*"))
    with pytest.raises(ConfigError, match="Megatron engine can load .*; got qwen2_vl"):
        plan_of(tmp_path, MEGATRON[0], "data.embedrl.family=qwen2_vl")


@pytest.mark.parametrize("name", [*FSDP, *MEGATRON])
def test_without_a_gpu_a_recipe_says_so_and_names_the_cpu_recipe(tmp_path: Path, name: str) -> None:
    result = run_recipe(name, path=no_gpu_path(tmp_path))
    assert result.returncode == 4
    assert "needs NVIDIA GPUs and this machine has none" in result.stderr
    assert "bash recipes/run_egrl_tiny_cpu.sh" in result.stderr
    assert (ROOT / "recipes" / "run_egrl_tiny_cpu.sh").is_file()


def test_fewer_gpus_than_asked_for_is_refused(tmp_path: Path) -> None:
    path = no_gpu_path(tmp_path)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\necho 'GPU 0: one'\n")
    result = run_recipe(FSDP[0], path=path)
    assert result.returncode == 4
    assert "GPUS_PER_NODE=8, but this machine has 1 GPU(s); set GPUS_PER_NODE=1" in result.stderr


def test_several_nodes_without_a_cluster_are_refused_with_both_ways_out(tmp_path: Path) -> None:
    path = no_gpu_path(tmp_path)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\necho 'GPU 0: one'\n")
    result = run_recipe(FSDP[0], path=path, NNODES="2", GPUS_PER_NODE="1", PYTHON=sys.executable)
    assert result.returncode == 2
    assert "RAY_ADDRESS" in result.stderr
    assert "NODE_RANK=0..1" in result.stderr
    nodes = {"NNODES": "2", "GPUS_PER_NODE": "1", "NODE_RANK": "0", "MASTER_ADDR": "192.0.2.1"}
    result = run_recipe(FSDP[0], path=path, PYTHON=sys.executable, **nodes)
    assert result.returncode == 2
    assert "set RAY_AUTH_TOKEN to the same secret on every node" in result.stderr


def test_a_dry_run_as_a_person_runs_it_prints_the_plan() -> None:
    good = run_recipe(FSDP[0], DRY_RUN="1", NNODES="4", PYTHON=sys.executable)
    assert good.returncode == 0, good.stderr
    assert "32 pairs x 2 sides = 64 prompts, x 8 rollouts = 512 rows a step" in good.stdout


def test_devices_that_the_batch_does_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one update has ppo_mini_batch_size x rollout.n = 32 x 8 = 256 rows"):
        plan_of(tmp_path, FSDP[0], NNODES="3")


@pytest.mark.parametrize("name", [FSDP[2], MEGATRON[1]])
@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_asynchronous_modes_are_planned_and_named(tmp_path: Path, name: str, mode: str) -> None:
    command = command_of(tmp_path, name, MODE=mode, GPUS_PER_NODE="4", ROLLOUT_GPUS_PER_NODE="2", ROLLOUT_NNODES="3")
    config = compose(command[2:])
    text = str(make_plan(config))
    assert config.trainer.v1.trainer_mode == f"egrl_{mode}"
    assert f"egrl_{mode}, staleness at 8: drop" in text
    own = "6 replicas of 1 GPU, on 6 GPUs of its own"
    assert (own in text) == (mode == "separate_async")


def test_the_rollouts_own_gpus_need_not_fit_those_of_training(tmp_path: Path) -> None:
    knobs = {"MODE": "separate_async", "GPUS_PER_NODE": "1", "ROLLOUT_GPUS_PER_NODE": "4", "ROLLOUT_TP": "4"}
    assert "1 replica of 4 GPUs, on 4 GPUs of its own" in str(plan_of(tmp_path, FSDP[2], **knobs))


def test_an_unknown_mode_and_too_few_gpus_for_both_are_refused(tmp_path: Path) -> None:
    bad = run_recipe(FSDP[0], DRY_RUN="1", PYTHON=sys.executable, MODE="async")
    assert bad.returncode == 2
    assert "MODE must be sync, colocate_async or separate_async; got async" in bad.stderr
    path = no_gpu_path(tmp_path)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\nprintf 'GPU 0: a\\nGPU 1: b\\n'\n")
    both = {"MODE": "separate_async", "GPUS_PER_NODE": "2", "PYTHON": sys.executable}
    few = run_recipe(FSDP[0], path=path, ROLLOUT_GPUS_PER_NODE="1", **both)
    assert few.returncode == 4
    assert "GPUS_PER_NODE + ROLLOUT_GPUS_PER_NODE = 2 + 1 = 3, but this machine has 2" in few.stderr
    several = run_recipe(FSDP[0], path=path, ROLLOUT_NNODES="2", **both)
    assert several.returncode == 2
    assert "MODE=separate_async on several nodes needs a Ray cluster" in several.stderr


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_recomputes_activations_and_offloads(tmp_path: Path, name: str) -> None:
    actor = compose(command_of(tmp_path, name)[2:]).actor_rollout_ref.actor.megatron
    recompute = actor.override_transformer_config
    assert (recompute.recompute_granularity, recompute.recompute_method, recompute.recompute_num_layers) == (
        *("full", "uniform"),
        1,
    )
    assert actor.param_offload and actor.optimizer_offload


@pytest.mark.parametrize(("mode", "offload"), [("sync", False), ("colocate_async", False), ("separate_async", True)])
def test_offload_follows_the_mode_unless_it_is_set(tmp_path: Path, mode: str, offload: bool) -> None:
    for variables, expected in (({}, offload), ({"OFFLOAD": str(not offload)}, not offload)):
        config = compose(command_of(tmp_path, FSDP[0], MODE=mode, **variables)[2:])
        assert config.actor_rollout_ref.actor.fsdp_config.param_offload is expected


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    assert compose(command_of(tmp_path, FSDP[0])[2:]).trainer.max_actor_ckpt_to_keep == 2


@pytest.mark.parametrize("attention", ["torch_varlen", "flash_attention_2", "sdpa"])
def test_one_setting_chooses_the_attention_of_actor_reference_and_embedder(tmp_path: Path, attention: str) -> None:
    config = compose(command_of(tmp_path, FSDP[0], ATTENTION=attention)[2:])
    model = config.actor_rollout_ref.model
    assert model.override_config.attn_implementation == config.embedrl.embedder.attn_implementation == attention
    assert model.use_remove_padding is (attention != "sdpa")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("OFFLOAD=yes", "OFFLOAD must be True or False; got yes"),
        ("ATTENTION=flash", "ATTENTION must be torch_varlen, flash_attention_2 or sdpa; got flash"),
    ],
)
def test_a_knob_with_another_value_is_refused_with_the_choices(tmp_path: Path, variable: str, message: str) -> None:
    name, value = variable.split("=")
    result = run_recipe(FSDP[0], DRY_RUN="1", PYTHON=sys.executable, **{name: value})
    assert result.returncode == 2 and message in result.stderr


def test_a_plan_counts_the_gpus_of_separate_rollouts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FSDP[0], MODE="separate_async", GPUS_PER_NODE="4")
    assert "for training, 4 for rollouts: 8 in all" in str(plan)


def started(tmp_path: Path, *arguments: str, fail: str = "-") -> tuple[list[str], str]:
    """Modules that a run (not a dry one) calls, and what it says; calls of the module `fail` fail."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    real = f'[[ "$1" != - ]] || exec {sys.executable} "$@"'  # what the configuration says
    stand_in.write_text(f'{recording(str(calls))}\n{real}\n[[ "$2" != embedrl_verl.{fail} ]]\n')
    stand_in.chmod(0o755)
    calls.unlink(missing_ok=True)
    variables = {"RAY_ADDRESS": "none", "PYTHON": str(stand_in), "OUT": str(tmp_path / "out")}
    done = run_recipe("run_egrl_qwen2vl.sh", *arguments, **variables)
    modules = [call[1].removeprefix("embedrl_verl.") for call in recorded(calls) if call[0] != "-"]
    return modules, done.stdout + done.stderr


def earlier_run(tmp_path: Path, *, checkpoint: bool) -> Path:
    out = tmp_path / "out"
    (out / "rollouts").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("of the first run")
    (out / "checkpoints").mkdir()
    if checkpoint:
        (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("50")
    return out


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
    out = earlier_run(tmp_path, checkpoint=checkpoint)
    modules, said = started(tmp_path, *arguments)
    assert modules == (["plan", "train"] if moved else ["train"]), said
    assert (out / "old-1" / "metrics.jsonl").is_file() is moved
    assert (out / "metrics.jsonl").is_file() is not moved
    assert {path.name for path in (out / "old-1").glob("*")} == (
        {"metrics.jsonl", "rollouts", "checkpoints"} if moved else set()
    )


def test_nothing_of_an_earlier_run_is_moved_for_settings_that_are_refused(tmp_path):
    out = earlier_run(tmp_path, checkpoint=False)
    assert started(tmp_path, fail="plan")[0] == ["plan"]
    assert (out / "metrics.jsonl").is_file() and not (out / "old-1").exists()


def test_a_first_run_moves_nothing(tmp_path):
    assert started(tmp_path)[0] == ["train"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PAIRS", "x", "PAIRS must be a whole number from 1; got x"),
        ("GPUS_PER_NODE", "0", "GPUS_PER_NODE must be a whole number from 1; got 0"),
        ("LR", "abc", "LR must be a number; got abc"),
        ("KL", "-1", "KL must be a number; got -1"),
    ],
)
def test_a_knob_that_is_no_number_is_refused(variable, value, message):
    result = run_recipe("run_egrl_qwen2_5vl.sh", DRY_RUN="1", PYTHON="true", **{variable: value})
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize("value", ["3e-6", "1", "0.01", ".5", "1E-3"])
def test_numbers_may_be_written_as_usual(tmp_path, value):
    assert f"actor_rollout_ref.actor.optim.lr={value}" in command_of(tmp_path, "run_egrl_qwen2vl.sh", LR=value)
