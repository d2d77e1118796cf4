# SPDX-License-Identifier: Apache-2.0
"""The run folder: a checkpoint that the tracker names is complete, and old ones go only after it."""

from __future__ import annotations

import json

import pytest

from embedrl_verl.contrastive.run_folder import RunFolder
from embedrl_verl.errors import ConfigError


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(folder: RunFolder, step: int, keep: int = 2) -> None:
    (folder.step_folder(step) / "embedder").mkdir(parents=True)
    folder.write_training(step, {"step": step})
    folder.complete(step, keep)


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step_")) for path in folder.checkpoints.glob("global_step_*"))


def test_a_checkpoint_counts_only_once_the_tracker_names_it(folder):
    assert folder.last_step() == 0
    save(folder, 5)
    (folder.step_folder(10) / "embedder").mkdir(parents=True)  # killed in the middle of this one
    assert folder.last_step() == 5
    assert folder.read_training(5) == {"step": 5}


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [6, 9]), (3, [3, 6, 9]), (9, [3, 6, 9])])
def test_so_many_checkpoints_stay(folder, keep, left):
    for step in (3, 6, 9):
        save(folder, step, keep)
    assert steps(folder) == left


def test_a_later_unfinished_checkpoint_is_not_counted_as_kept(folder):
    save(folder, 3)
    (folder.step_folder(12) / "embedder").mkdir(parents=True)
    save(folder, 6, keep=1)
    assert steps(folder) == [6, 12] and folder.last_step() == 6


def test_a_tracker_without_its_checkpoint_is_an_error(folder):
    save(folder, 3)
    folder.step_folder(3).rename(folder.checkpoints / "elsewhere")
    with pytest.raises(ConfigError, match="names step 3, but"):
        folder.last_step()


def test_metrics_of_updates_that_will_be_made_again_are_dropped(folder):
    folder.out.mkdir()
    folder.forget_after(0)  # no file yet
    for step in range(5):
        folder.log(step, {"loss": float(step)})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "data": {"lo')  # killed in the middle of a line
    folder.forget_after(2)
    folder.log(3, {"loss": 33.0})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(line["step"], line["data"]["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)]
