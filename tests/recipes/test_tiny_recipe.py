# SPDX-License-Identifier: Apache-2.0
"""The CPU recipe: its plan, and what is done again when it is run again. The stages themselves are stood in for."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.plan import make_plan
from tests.recipes.calls import recorded, recording

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["models", "models", "digits", "contrastive", "sft", "train", "cli", "evaluate", "summary"]
# Writes down the module that it is called for; a training leaves a checkpoint behind.
STAND_IN = (
    recording('"$OUT/calls"', '"${2##*.}" "${@:3}"', without="embedrl_verl.platforms.forkserver")
    + """
[[ "${2##*.}" != "${FAIL:-}" ]] || exit 1
if [[ "$2" == embedrl_verl.train ]]; then
    mkdir -p "$OUT/rl/checkpoints/global_step_7/actor" ${EMBEDDER:+"$OUT/rl/checkpoints/global_step_7/embedder"}
    echo 7 >"$OUT/rl/checkpoints/latest_checkpointed_iteration.txt"
fi
if [[ "$2" == embedrl_verl.cli && "$6" == embedder ]]; then
    mkdir -p "$OUT/embedder_cotrained"
fi
"""
)


class Recipe:
    """The recipe with a stand-in for Python, in a folder of its own."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.python = out / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> tuple[int, list[list[str]]]:
        """Exit code, and the calls of Python: module, arguments."""
        (self.out / "calls").unlink(missing_ok=True)
        env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "OUT": str(self.out), "PYTHON": str(self.python)}
        command = ["bash", str(ROOT / "recipes" / "run_egrl_tiny_cpu.sh"), *arguments]
        result = subprocess.run(
            command, env={**env, **variables}, capture_output=True, text=True, timeout=300, check=False
        )
        self.said = result.stdout + result.stderr
        return result.returncode, recorded(self.out / "calls")

    def modules(self, *arguments: str, **variables: str) -> list[str]:
        """Modules in the order of their calls; the two that run at once in alphabetical order."""
        code, calls = self.run(*arguments, **variables)
        assert code == 0
        names = [call[0] for call in calls]
        if "sft" in names:
            first = min(names.index("sft"), names.index("contrastive"))
            names[first : first + 2] = sorted(names[first : first + 2])
        return names


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path)


def test_the_plan_holds_complete_pairs_and_two_updates_a_step(recipe: Recipe) -> None:
    _, [[module, *overrides]] = recipe.run("trainer.total_training_steps=3", DRY_RUN="1", SEED="5")
    assert module == "plan"
    config = compose(overrides)
    plan = make_plan(config)
    assert plan.batch.updates == 2
    assert plan.batch.devices == 1
    assert config.data.seed == 5
    assert config.trainer.total_training_steps == 3
    assert "1 process on the CPU (gloo)" in str(plan)


def test_every_stage_runs_once_in_order_and_the_table_is_shown_every_time(recipe: Recipe) -> None:
    _, calls = recipe.run()
    assert sorted(call[0] for call in calls) == sorted(STAGES)
    export = next(call for call in calls if call[0] == "cli")
    checkpoint = f"{recipe.out}/rl/checkpoints/global_step_7"
    assert export[1:] == ["export", checkpoint, "--kind", "reasoner", "--out", f"{recipe.out}/reasoner", "--force"]
    assert recipe.modules() == ["summary"]


def test_a_co_trained_embedder_is_exported_and_evaluates_too(recipe: Recipe) -> None:
    _, calls = recipe.run(EMBEDDER="1")
    exported = [call[4] for call in calls if call[0] == "cli"]
    assert exported == ["reasoner", "embedder"]
    used = [Path(call[call.index("--embedder") + 1]).name for call in calls if call[0] == "evaluate"]
    assert used == ["embedder", "embedder_cotrained"]


def test_an_interrupted_training_goes_on_and_a_longer_one_too(recipe: Recipe) -> None:
    assert recipe.run(FAIL="train")[0] == 1
    kept = recipe.out / "rl" / "checkpoints"
    kept.mkdir(exist_ok=True)
    assert recipe.modules() == STAGES[STAGES.index("train") :]
    assert kept.is_dir()
    (kept / "global_step_3").mkdir()
    assert recipe.modules(STEPS="200") == STAGES[STAGES.index("train") :]
    assert (kept / "global_step_3").is_dir()


def test_other_settings_start_anew_and_move_the_earlier_run_aside(recipe: Recipe) -> None:
    recipe.modules()
    for name in ("metrics.jsonl", "metrics.jsonl.1", "results.json", "curves.png"):
        (recipe.out / name).write_text("of the first run")
    assert recipe.modules("actor_rollout_ref.rollout.n=4") == ["plan", *STAGES[STAGES.index("train") :]]
    assert (recipe.out / "old-1" / "rl" / "checkpoints" / "global_step_7").is_dir()
    for name in ("metrics.jsonl", "metrics.jsonl.1", "results.json", "curves.png"):
        assert (recipe.out / "old-1" / name).read_text() == "of the first run"
        assert not (recipe.out / name).exists()
    recipe.modules("actor_rollout_ref.rollout.n=6")
    assert (recipe.out / "old-2" / "rl").is_dir() and (recipe.out / "old-1" / "rl").is_dir()


def test_a_run_of_fewer_steps_than_are_done_is_another_run(recipe: Recipe) -> None:
    recipe.modules()
    assert recipe.modules(STEPS="6") == ["plan", *STAGES[STAGES.index("train") :]]
    assert (recipe.out / "old-1" / "rl" / "checkpoints" / "global_step_7").is_dir()
    assert "rl: before 7 steps, now STEPS=6" in recipe.said


def test_nothing_is_moved_for_settings_that_the_plan_refuses(recipe: Recipe) -> None:
    recipe.modules()
    (recipe.out / "results.json").write_text("of the first run")
    code, calls = recipe.run("actor_rollout_ref.rollout.n=0", FAIL="plan")
    assert code == 1 and [call[0] for call in calls] == ["plan"]
    assert (recipe.out / "rl" / "checkpoints" / "global_step_7").is_dir()
    assert (recipe.out / "results.json").is_file() and not (recipe.out / "old-1").exists()
    assert recipe.modules() == ["summary"]


def test_results_of_fewer_steps_do_not_stand_beside_a_longer_run(recipe: Recipe) -> None:
    recipe.modules()
    (recipe.out / "results.json").write_text("of 40 steps")
    assert recipe.run(STEPS="80", FAIL="train")[0] == 1
    assert not (recipe.out / "results.json").exists() and (recipe.out / "old-1" / "results.json").is_file()
    assert (recipe.out / "rl" / "checkpoints" / "global_step_7").is_dir()


def test_other_models_in_a_folder_that_holds_a_run_are_refused_with_the_difference(recipe: Recipe) -> None:
    recipe.modules()
    before = sorted(recipe.out.rglob("*"))
    code, calls = recipe.run(SEED="1")
    assert (code, calls) == (2, [])
    assert "stage world is 'make_world qwen2_vl 0', and now it would be 'make_world qwen2_vl 1'" in recipe.said
    assert sorted(recipe.out.rglob("*")) == [path for path in before if path.name != "calls"]


@pytest.mark.parametrize("broken", ["sft", "contrastive"])
def test_a_training_that_fails_ends_the_other_and_is_done_again(recipe: Recipe, broken: str) -> None:
    assert recipe.run(FAIL=broken)[0] == 1
    assert "unbound variable" not in recipe.said
    assert recipe.modules() == STAGES[STAGES.index("contrastive") :]


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["--help"], {}, 0, "Stages: world (models and data)"),
        (["-h"], {"REWARD": "none.py"}, 0, "UNTIL=<stage>"),
        ([], {"UNTIL": "pretraining"}, 2, "UNTIL must be a stage"),
        ([], {"STEPS": "abc"}, 2, "STEPS must be a whole number from 1; got abc"),
        ([], {"STEPS": "0", "DRY_RUN": "1"}, 2, "STEPS must be a whole number from 1; got 0"),
        ([], {"SEED": "x"}, 2, "SEED must be a whole number from 0; got x"),
        (
            [],
            {"REWARD": "reward/papr.py"},
            2,
            "REWARD must name a file of a reward function; there is no reward/papr.py",
        ),
        ([], {"FAMILY": "qwen4_vl"}, 2, "FAMILY must be one of qwen2_vl qwen2_5_vl qwen3_vl ; got qwen4_vl"),
    ],
)
def test_help_and_wrong_values_touch_nothing(
    recipe: Recipe, arguments: list[str], variables: dict[str, str], code: int, message: str
) -> None:
    recipe.modules()
    before = sorted(recipe.out.rglob("*"))
    assert recipe.run(*arguments, **variables) == (code, [])
    assert message in recipe.said
    assert sorted(recipe.out.rglob("*")) == [path for path in before if path.name != "calls"]


@pytest.mark.parametrize("stage", ["world", "pretrain", "rl", "export", "evaluate"])
def test_until_ends_after_its_stage(recipe: Recipe, stage: str) -> None:
    recipe.modules(UNTIL=stage)
    assert (recipe.out / ".stages" / stage).is_file()
    later = ["world", "pretrain", "rl", "export", "evaluate"]
    for name in later[later.index(stage) + 1 :]:
        assert not (recipe.out / ".stages" / name).exists()


def test_a_second_run_in_the_same_folder_is_refused(recipe: Recipe) -> None:
    (recipe.out / ".lock").touch()
    with (recipe.out / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert recipe.run() == (4, [])
    assert f"OUT={recipe.out} is in use by another run" in recipe.said
    assert len(recipe.modules()) == len(STAGES)
