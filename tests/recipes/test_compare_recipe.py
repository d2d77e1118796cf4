# SPDX-License-Identifier: Apache-2.0
"""The comparison of variants: what is shared between its runs, and what is not. Stages are stood in for."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from tests.recipes.calls import Recipe, modules_of

REWARDS = {"VARIANTS": "no_judge paper"}


@pytest.fixture
def comparison(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path, "compare_tiny_cpu.sh")


def test_models_and_judge_are_made_once_for_a_seed_and_every_reward_trains_from_them(comparison: Recipe) -> None:
    code, calls = comparison.run(SEEDS="3 4", **REWARDS)
    counts = Counter(modules_of(calls))
    names = ("cold_start", "contrastive", "judge", "train", "compare_table")
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


def test_an_ablation_changes_one_thing_and_pretrains_where_its_tcots_differ(comparison: Recipe) -> None:
    code, calls = comparison.run(SEEDS="3")
    counts = Counter(modules_of(calls))
    names = ("world", "cold_start", "contrastive", "judge", "train", "evaluate", "compare_table")
    assert (code, [counts[name] for name in names]) == (0, [1, 3, 3, 0, 4, 4, 1])
    full, *others = (compose(call[2:]) for call in calls if call[1] == "embedrl_verl.train")
    assert [config.embedrl.evidence.max_items for config in (full, *others)] == [8, 0, 0, 8]
    assert others[-1].reward.custom_reward_function.reward_kwargs == {"temperature": 1e6}
    base = comparison.out / "base" / "seed3"
    for config, shared in zip((full, *others), (True, False, False, True), strict=True):
        for path in (config.actor_rollout_ref.model.path, config.embedrl.embedder.path):
            assert Path(path).is_symlink() == shared and (not shared or Path(path).readlink().parent == base)
    told = {call[1].split(".")[-1]: [] for call in calls if "--tcot" in call}
    for call in calls:
        if "--tcot" in call:
            told[call[1].split(".")[-1]].append(call[call.index("--tcot") + 1])
    parts = ["no_evidence", "answer_only"]
    assert told == {"cold_start": parts, "contrastive": parts, "evaluate": parts}


def test_a_finished_run_is_not_run_again_and_overrides_reach_every_training(comparison: Recipe) -> None:
    arguments = ("actor_rollout_ref.rollout.n=2",)
    _, calls = comparison.run(*arguments, SEEDS="3", **REWARDS)
    trained = [compose(call[2:]) for call in calls if call[1] == "embedrl_verl.train"]
    assert [config.actor_rollout_ref.rollout.n for config in trained] == [2, 2]
    assert set(comparison.modules(*arguments, SEEDS="3", **REWARDS)) == {"summary", "compare_table"}
    shutil.rmtree(comparison.out / "paper")
    assert comparison.modules(*arguments, SEEDS="3", **REWARDS).count("train") == 1


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("no_judge nothing", "there is no reward/nothing.py"),
        ("paper", "two or more variants"),
        ("full paper full", "full is there twice"),
    ],
)
def test_a_comparison_that_cannot_end_is_refused_before_anything_runs(comparison, variants, message):
    assert comparison.run(VARIANTS=variants) == (2, [])
    assert message in comparison.said and not comparison.out.exists()
