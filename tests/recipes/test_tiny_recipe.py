# SPDX-License-Identifier: Apache-2.0
"""The CPU recipe: its plan, and what is done again when it is run again. The stages themselves are stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.plan import make_plan
from recipes.tiny_digits.settings import MAX_NEW_TOKENS, tiny_limits
from tests.recipes.calls import ROOT, Recipe, modules_of

WORLD, PRETRAIN = ["models", "models", "world"], ["cold_start", "contrastive"]
RL = ["train", "cli", "evaluate", "summary"]
LATER = {"world": PRETRAIN + RL, "pretrain": RL, "rl": RL[1:], "export": RL[2:], "evaluate": RL[3:]}
FILES = ("metrics.jsonl", "metrics.jsonl.1", "results.json", "curves.png")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path, "run_egrl_tiny_cpu.sh")


def files(recipe: Recipe) -> list[Path]:
    return sorted(recipe.out.rglob("*"))


def test_the_plan_holds_complete_pairs_and_two_updates_a_step(recipe: Recipe) -> None:
    _, [[_, module, *overrides]] = recipe.run("trainer.total_training_steps=3", DRY_RUN="1", SEED="5")
    assert module == "embedrl_verl.plan"
    config = compose(overrides)
    plan = make_plan(config)
    assert (plan.batch.updates, plan.batch.devices) == (2, 1)
    assert (config.data.seed, config.trainer.total_training_steps) == (5, 3)
    assert "1 process on the CPU (gloo)" in str(plan)


def test_every_stage_runs_once_in_order_and_the_table_is_shown_every_time(recipe: Recipe) -> None:
    _, calls = recipe.run()
    names = modules_of(calls)
    assert (names[:3], sorted(names[3:5]), names[5:]) == (WORLD, PRETRAIN, RL)
    checkpoint = f"{recipe.out}/rl/checkpoints/global_step_7"
    wanted = ["export", checkpoint, "--kind", "reasoner", "--out", f"{recipe.out}/reasoner", "--force"]
    assert calls[names.index("cli")][2:] == wanted
    assert recipe.modules() == ["summary"]


def test_a_judge_is_trained_for_a_reward_that_has_one(recipe: Recipe) -> None:
    _, calls = recipe.run(REWARD="reward/paper.py", UNTIL="rl")
    names = modules_of(calls)
    assert names[5:] == ["judge", "train"]
    reward = compose(calls[-1][2:]).reward
    assert reward.reward_model.enable and reward.reward_model.model_path == f"{recipe.out}/judge"


def test_a_co_trained_embedder_is_exported_and_evaluates_too(recipe: Recipe) -> None:
    _, calls = recipe.run(EMBEDDER="1")
    by_name = list(zip(modules_of(calls), calls, strict=True))
    assert [call[5] for name, call in by_name if name == "cli"] == ["reasoner", "embedder"]
    assert [Path(call[2]).name for name, call in by_name if name == "evaluate"] == ["embedder", "embedder_cotrained"]


def test_an_interrupted_training_goes_on_and_a_longer_one_too(recipe: Recipe) -> None:
    assert recipe.run(FAIL="train")[0] == 1
    kept = recipe.out / "rl" / "checkpoints" / "global_step_3"
    kept.mkdir(parents=True)
    assert recipe.modules() == RL
    (recipe.out / "results.json").write_text("of 40 steps")
    assert recipe.run(STEPS="200", FAIL="train")[0] == 1
    assert not (recipe.out / "results.json").exists() and (recipe.out / "old-1" / "results.json").is_file()
    assert recipe.modules(STEPS="200") == RL and kept.is_dir()


def test_other_settings_start_anew_and_move_the_earlier_run_aside(recipe: Recipe) -> None:
    recipe.modules()
    for name in FILES:
        (recipe.out / name).write_text("of the first run")
    assert recipe.modules("actor_rollout_ref.rollout.n=4") == ["plan", *RL]
    old = recipe.out / "old-1"
    assert (old / "rl" / "checkpoints" / "global_step_7").is_dir()
    assert all((old / name).read_text() == "of the first run" for name in FILES)
    assert not any((recipe.out / name).exists() for name in FILES)
    recipe.modules("actor_rollout_ref.rollout.n=6")
    assert (recipe.out / "old-2" / "rl").is_dir() and (old / "rl").is_dir()


def test_a_run_of_fewer_steps_than_are_done_is_another_run(recipe: Recipe) -> None:
    recipe.modules()
    assert recipe.modules(STEPS="6") == ["plan", *RL]
    assert (recipe.out / "old-1" / "rl" / "checkpoints" / "global_step_7").is_dir()
    assert "rl: before 7 steps, now STEPS=6" in recipe.said


def test_nothing_is_moved_for_settings_that_the_plan_refuses(recipe: Recipe) -> None:
    recipe.modules()
    before = files(recipe)
    code, calls = recipe.run("actor_rollout_ref.rollout.n=0", FAIL="plan")
    assert (code, modules_of(calls)) == (1, ["plan"])
    assert files(recipe) == before and recipe.modules() == ["summary"]


def test_other_models_in_a_folder_that_holds_a_run_are_refused_with_the_difference(recipe: Recipe) -> None:
    recipe.modules()
    before = files(recipe)
    assert recipe.run(SEED="1") == (2, [])
    assert "stage world is 'make_world qwen2_vl 0', and now it would be 'make_world qwen2_vl 1'" in recipe.said
    assert files(recipe) == before


@pytest.mark.parametrize("broken", PRETRAIN)
def test_a_training_that_fails_ends_the_other_and_is_done_again(recipe: Recipe, broken: str) -> None:
    assert recipe.run(FAIL=broken)[0] == 1
    assert "unbound variable" not in recipe.said
    assert sorted(recipe.modules()[:2]) == PRETRAIN


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["--help"], {}, 0, "Stages: world (models and data)"),
        (["-h"], {"REWARD": "none.py"}, 0, "UNTIL=<stage>"),
        ([], {"UNTIL": "pretraining"}, 2, "UNTIL must be a stage"),
        ([], {"STEPS": "0", "DRY_RUN": "1"}, 2, "STEPS must be a whole number from 1; got 0"),
        ([], {"SEED": "x"}, 2, "SEED must be a whole number from 0; got x"),
        ([], {"REWARD": "reward/papr.py"}, 2, "must name a file of a reward function; there is no reward/papr.py"),
        ([], {"PRETRAIN_STEPS": "1e2"}, 2, "PRETRAIN_STEPS must be a whole number from 1; got 1e2"),
        ([], {"VAL_FILES": "reward"}, 2, "VAL_FILES and MEDIA_ROOT are of your own pairs; set TRAIN_FILES too"),
        ([], {"TRAIN_FILES": "reward"}, 2, "embedrl data split FILE --rl-from all --holdout 0.2 --out DIR"),
        ([], {"TRAIN_FILES": "reward", "VAL_FILES": "none.parquet"}, 2, "there is no none.parquet"),
        (
            [],
            {"TRAIN_FILES": "reward", "VAL_FILES": "docs", "MEDIA_ROOT": "no"},
            2,
            "must be a folder; there is none at no",
        ),
        ([], {"FAMILY": "qwen4_vl"}, 2, "FAMILY must be one of qwen2_vl qwen2_5_vl qwen3_vl ; got qwen4_vl"),
    ],
)
def test_help_and_wrong_values_touch_nothing(recipe, arguments, variables, code, message):
    assert recipe.run(*arguments, **variables) == (code, [])
    assert message in recipe.said and not recipe.out.exists()


def test_own_pairs_are_what_every_stage_is_about(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("train a.parquet", "more.parquet", "val.parquet"):
        (tmp_path / name).write_text("")
    own = {"TRAIN_FILES": f"{tmp_path}/train a.parquet,{tmp_path}/more.parquet", "VAL_FILES": f"{tmp_path}/val.parquet"}
    _, calls = recipe.run(**own, MEDIA_ROOT=str(tmp_path), PRETRAIN_STEPS="7")
    called = dict(zip(modules_of(calls), calls, strict=True))
    root = ["--media-root", str(tmp_path)]
    trained = ["--pairs", f"{tmp_path}/train a.parquet", "--pairs", f"{tmp_path}/more.parquet", *root]
    for name in PRETRAIN:
        assert called[name][5:] == ["--seed", "0", "--steps", "7", *trained]
    assert called["evaluate"][6:] == [f"{tmp_path}/val.parquet", "--seed", "0", "--suffix", "", *root]
    data = compose(called["train"][2:]).data
    assert data.train_files == own["TRAIN_FILES"].split(",") and data.val_files == [own["VAL_FILES"]]
    assert data.media_root == str(tmp_path)
    assert recipe.modules(**own, MEDIA_ROOT=str(tmp_path), PRETRAIN_STEPS="7") == ["summary"]
    assert recipe.run(**own, PRETRAIN_STEPS="7") == (2, []) and "stage pretrain is" in recipe.said


def test_the_recipe_and_the_programs_beside_it_have_the_same_media_limits(recipe: Recipe) -> None:
    _, [[_, _, *overrides]] = recipe.run(DRY_RUN="1")
    config = compose(overrides)
    for section in (config.data.embedrl, config.embedrl.embedder):
        limits = MediaLimits(
            28, *(section[f"{kind}_{end}_tokens"] for kind in ("image", "frame") for end in ("min", "max"))
        )
        assert limits == tiny_limits("qwen2_vl")
    assert config.data.max_response_length == MAX_NEW_TOKENS


@pytest.mark.parametrize("stage", LATER)
def test_until_ends_after_its_stage(recipe: Recipe, stage: str) -> None:
    recipe.modules(UNTIL=stage)
    assert (recipe.out / ".stages" / stage).is_file()
    assert sorted(recipe.modules()) == sorted(LATER[stage])


def test_another_logger_is_no_other_run(recipe: Recipe) -> None:
    recipe.modules()
    assert recipe.modules(LOGGER="console,tensorboard") == ["summary"]


@pytest.mark.parametrize("stage", ["world", "cold_start", "train", "evaluate"])
def test_ctrl_c_says_where_the_run_stands_and_what_goes_on(recipe: Recipe, stage: str) -> None:
    if stage == "train":
        recipe.run("data.seed=1", FAIL="train")
        (recipe.out / "rl" / "checkpoints").mkdir()
        (recipe.out / "rl" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    code, _ = recipe.run("data.seed=1", INTERRUPT=stage)
    names = {"cold_start": "pretrain", "train": "rl (step 3: update), last checkpoint: step 2"}
    goes_on = f"the same command goes on from there: bash {ROOT}/recipes/run_egrl_tiny_cpu.sh 'data.seed=1'"
    assert code == 130
    (line,) = [line for line in recipe.said.splitlines() if "interrupted" in line]
    assert line == f"[recipe] interrupted in stage {names.get(stage, stage)}; {goes_on}"
    assert recipe.said.splitlines()[-1] == line
