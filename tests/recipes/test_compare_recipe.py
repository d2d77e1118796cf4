# SPDX-License-Identifier: Apache-2.0
"""The comparison of rewards: what is shared between its runs, and what is not. Stages are stood in for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from tests.recipes.calls import recorded, recording

ROOT = Path(__file__).resolve().parents[2]
REWARDS = "no_judge paper"
# Writes down the module that it is called for, with its arguments; a training leaves a checkpoint behind.
STAND_IN = (
    recording('"$LOG"', '"${2##*.}" "${@:3}"', without="embedrl_verl.platforms.forkserver")
    + """
if [[ "$2" == embedrl_verl.train ]]; then
    for word in "$@"; do
        [[ "$word" != trainer.default_local_dir=* ]] || folder=$(eval "echo ${word#*=}")
    done
    mkdir -p "$folder/global_step_7/actor"
    echo 7 >"$folder/latest_checkpointed_iteration.txt"
fi
"""
)


class Comparison:
    """The recipe with a stand-in for Python, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.out, self._log, self._python = folder / "out", folder / "calls", folder / "python"
        self._python.write_text(STAND_IN)
        self._python.chmod(0o755)

    def run(self, *arguments: str, code: int = 0, **variables: str) -> tuple[list[list[str]], str]:
        """The calls of Python, and standard error."""
        self._log.unlink(missing_ok=True)
        env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHON": str(self._python)}
        settings = {"OUT": str(self.out), "LOG": str(self._log), "SEEDS": "3", "REWARDS": REWARDS}
        result = subprocess.run(
            ["bash", str(ROOT / "recipes" / "compare_rewards_tiny_cpu.sh"), *arguments],
            env={**env, **settings, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return recorded(self._log), result.stderr


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison(tmp_path)


def test_models_and_judge_are_made_once_for_a_seed_and_every_reward_trains_from_them(comparison: Comparison) -> None:
    calls, _ = comparison.run(SEEDS="3 4")
    modules = [call[0] for call in calls]
    assert {name: modules.count(name) for name in ("sft", "contrastive", "judge", "train", "reward_table")} == {
        "sft": 2,
        "contrastive": 2,
        "judge": 2,
        "train": 4,
        "reward_table": 1,
    }
    configs = [compose(call[1:]) for call in calls if call[0] == "train"]
    assert [Path(config.reward.custom_reward_function.path).stem for config in configs] == 2 * REWARDS.split()
    assert [config.data.seed for config in configs] == [3, 3, 4, 4]
    assert [config.reward.reward_model.enable for config in configs] == [False, True, False, True]
    for config in configs:
        base = comparison.out / "base" / f"seed{config.data.seed}"
        for path, name in ((config.actor_rollout_ref.model.path, "sft"), (config.embedrl.embedder.path, "embedder")):
            assert Path(path).is_symlink() and Path(path).readlink() == base / name
    table = calls[-1]
    assert table[1:3] == ["--runs", "no_judge=" + ",".join(f"{comparison.out}/no_judge/seed{n}" for n in (3, 4))]


def test_a_finished_run_is_not_run_again_and_overrides_reach_every_training(comparison: Comparison) -> None:
    calls, _ = comparison.run("actor_rollout_ref.rollout.n=2")
    assert [compose(call[1:]).actor_rollout_ref.rollout.n for call in calls if call[0] == "train"] == [2, 2]
    again, _ = comparison.run("actor_rollout_ref.rollout.n=2")
    assert {call[0] for call in again} == {"summary", "reward_table"}
    shutil.rmtree(comparison.out / "paper")
    once, _ = comparison.run("actor_rollout_ref.rollout.n=2")
    assert [call[0] for call in once].count("train") == 1


@pytest.mark.parametrize(
    ("rewards", "message"),
    [("no_judge nothing", "there is no reward/nothing.py"), ("paper", "two or more reward functions")],
)
def test_a_comparison_that_cannot_end_is_refused_before_anything_runs(
    comparison: Comparison, rewards: str, message: str
) -> None:
    calls, error = comparison.run(REWARDS=rewards, code=2)
    assert message in error
    assert not calls and not comparison.out.exists()
