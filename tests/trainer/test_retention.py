# SPDX-License-Identifier: Apache-2.0
"""A run keeps as many checkpoints as it is told, however often it was resumed, and touches nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.trainer.checkpoint import RECORD
from embedrl_verl.trainer.retention import prune_checkpoints


def step(root: Path, number: int, *parts: str, record: bool = True) -> Path:
    folder = root / f"global_step_{number}"
    for part in parts:
        (folder / part).mkdir(parents=True)
    (folder / "data.pt").touch()
    if record:
        (folder / RECORD).touch()
    return folder


def with_weights(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("global_step_*/actor"))


ALL = [2, 8, 12]


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [8, 12]), (3, ALL), (9, ALL), (0, ALL), (-1, ALL)])
def test_the_newest_weights_are_kept_in_the_order_of_steps(tmp_path, keep, left):
    for number in (2, 8, 12):
        step(tmp_path, number, "actor", "embedder")
    removed = prune_checkpoints(tmp_path, 12, keep)
    assert with_weights(tmp_path) == sorted(f"global_step_{number}" for number in left)
    assert len(removed) == 2 * (3 - len(left))
    assert all((tmp_path / f"global_step_{number}" / "data.pt").is_file() for number in (2, 8, 12))
    assert prune_checkpoints(tmp_path, 12, keep) == []


def test_what_is_not_of_this_run_stays(tmp_path):
    step(tmp_path, 1, "actor")
    step(tmp_path, 4, "actor")
    step(tmp_path, 9, "actor")  # of a run that has gone back to step 4
    step(tmp_path, 2, "actor", record=False)
    (tmp_path / "global_step_3_mine" / "actor").mkdir(parents=True)
    step(tmp_path / "best", 1, "actor")
    assert prune_checkpoints(tmp_path, 4, 1) == [tmp_path / "global_step_1" / "actor"]
    assert with_weights(tmp_path) == ["global_step_2", "global_step_3_mine", "global_step_4", "global_step_9"]
    assert (tmp_path / "best" / "global_step_1" / "actor").is_dir()


def test_all_are_kept_without_a_number(tmp_path):
    step(tmp_path, 1, "actor")
    step(tmp_path, 2, "actor")
    assert prune_checkpoints(tmp_path, 2, None) == [] and len(with_weights(tmp_path)) == 2


def test_links_are_neither_followed_nor_removed(tmp_path):
    other = step(tmp_path / "other", 5, "actor")
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step_5").symlink_to(other)
    step(run, 6, "other")
    (run / "global_step_6" / "actor").symlink_to(other / "actor")
    step(run, 7, "actor")
    step(run, 8, "actor")
    assert prune_checkpoints(run, 8, 1) == [run / "global_step_7" / "actor"]
    assert (other / "actor").is_dir() and (run / "global_step_6" / "actor").is_symlink()
