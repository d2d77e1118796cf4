# SPDX-License-Identifier: Apache-2.0
"""The run folder: a checkpoint that the tracker names is complete, and old ones go only after it."""

from __future__ import annotations

import json

import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def begin(folder: RunFolder, *steps: int) -> None:
    """What a run that is killed in the middle of a checkpoint leaves."""
    for step in steps:
        (folder.step_folder(step) / "embedder").mkdir(parents=True)


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step_")) for path in folder.checkpoints.glob("global_step_*"))


@pytest.mark.parametrize(("keep", "left"), [(1, [9, 12]), (2, [6, 9, 12]), (3, [3, 6, 9, 12]), (9, [3, 6, 9, 12])])
def test_a_checkpoint_counts_once_the_tracker_names_it_and_so_many_stay(folder, keep, left):
    assert folder.last_step() == 0
    begin(folder, 12)
    for step in (3, 6, 9):
        begin(folder, step)
        folder.complete(step, keep)
    assert steps(folder) == left and folder.last_step() == 9


def test_a_tracker_without_its_checkpoint_is_an_error(folder):
    begin(folder, 3)
    folder.complete(3, 1)
    folder.step_folder(3).rename(folder.checkpoints / "elsewhere")
    with pytest.raises(ConfigError, match="names step 3, but"):
        folder.last_step()


def test_metrics_of_updates_that_will_be_made_again_are_dropped(folder):
    folder.out.mkdir()
    folder.forget_after(0)  # no file yet
    for step in range(5):
        folder.log(step, {"loss": float(step)})
    with folder.metrics.open("a") as file:
        file.write('{"step": 1, "data": {"lo')  # killed in the middle of a line
    folder.forget_after(2)
    folder.log(3, {"loss": 33.0})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(line["step"], line["data"]["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)]
