# SPDX-License-Identifier: Apache-2.0
"""The comparison of rewards: what is shared between its runs, and what is not. Stages are stood in for."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from tests.recipes.calls import Recipe, modules_of

REWARDS = {"REWARDS": "no_judge paper"}


@pytest.fixture
def comparison(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path, "compare_rewards_tiny_cpu.sh")


def test_models_and_judge_are_made_once_for_a_seed_and_every_reward_trains_from_them(comparison: Recipe) -> None:
    code, calls = comparison.run(SEEDS="3 4", **REWARDS)
    counts = Counter(modules_of(calls))
    names = ("cold_start", "contrastive", "judge", "train", "reward_table")
    assert (code, [counts[name] for name in names]) == (0, [2, 2, 2, 4, 1])
    configs = [compose(call[2:]) for call in calls if call[1] == "embedrl_verl.train"]
    assert [Path(config.reward.custom_reward_function.path).stem for config in configs] == ["no_judge", "paper"] * 2
    assert [config.data.seed for config in configs] == [3, 3, 4, 4]
    assert [config.reward.reward_model.enable for config in configs] == [False, True, False, True]
    for config in configs:
        base = comparison.out / "base" / f"seed{config.data.seed}"
        for path, name in ((config.actor_rollout_ref.model.path, "sft"), (config.embedrl.embedder.path, "embedder")):
            assert Path(path).is_symlink() and Path(path).readlink() == base / name
    runs = [f"{name}=" + ",".join(f"{comparison.out}/{name}/seed{n}" for n in (3, 4)) for name in ("no_judge", "paper")]
    assert calls[-1][1:] == [str(comparison.out), *runs]


def test_a_finished_run_is_not_run_again_and_overrides_reach_every_training(comparison: Recipe) -> None:
    arguments = ("actor_rollout_ref.rollout.n=2",)
    _, calls = comparison.run(*arguments, SEEDS="3", **REWARDS)
    trained = [compose(call[2:]) for call in calls if call[1] == "embedrl_verl.train"]
    assert [config.actor_rollout_ref.rollout.n for config in trained] == [2, 2]
    assert set(comparison.modules(*arguments, SEEDS="3", **REWARDS)) == {"summary", "reward_table"}
    shutil.rmtree(comparison.out / "paper")
    assert comparison.modules(*arguments, SEEDS="3", **REWARDS).count("train") == 1


@pytest.mark.parametrize(
    ("rewards", "message"),
    [("no_judge nothing", "there is no reward/nothing.py"), ("paper", "two or more reward functions")],
)
def test_a_comparison_that_cannot_end_is_refused_before_anything_runs(comparison, rewards, message):
    assert comparison.run(REWARDS=rewards) == (2, [])
    assert message in comparison.said and not comparison.out.exists()
