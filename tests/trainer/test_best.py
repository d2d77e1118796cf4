# SPDX-License-Identifier: Apache-2.0
"""The best checkpoint stays when verl takes older ones away, and whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from embedrl_verl.trainer import best
from embedrl_verl.trainer.best import keep_if_best


def save(root: Path, step: int) -> None:
    """A checkpoint as verl leaves it."""
    actor = root / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True)
    (actor / "weights.pt").write_text(f"weights {step}")
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))


def kept(root: Path) -> tuple[int, str]:
    score = json.loads((root / "best" / "score.json").read_text())
    (folder,) = (root / "best").glob("global_step_*")
    assert folder.name == f"global_step_{score['step']}"
    return score["step"], (folder / "actor" / "weights.pt").read_text()


def test_the_best_stays_and_is_replaced_by_a_better_one_only(tmp_path):
    for step, score, is_best in ((1, 0.5, True), (2, 0.4, False), (3, 0.5, False), (4, 0.6, True)):
        save(tmp_path, step)
        assert keep_if_best(tmp_path, step, score) is is_best
        shutil.rmtree(tmp_path / f"global_step_{step}")  # verl's retention
    assert kept(tmp_path) == (4, "weights 4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest_checkpointed_iteration.txt"]


def test_a_validation_without_a_checkpoint_of_its_step_keeps_nothing(tmp_path):
    assert not keep_if_best(tmp_path, 0, 0.9)
    save(tmp_path, 5)
    assert not keep_if_best(tmp_path, 6, 0.9)
    assert not (tmp_path / "best").exists()


def test_files_are_linked_or_copied_where_there_are_no_links(tmp_path, monkeypatch):
    save(tmp_path, 1)
    keep_if_best(tmp_path, 1, 0.1)
    weights = Path("actor", "weights.pt")
    assert (tmp_path / "best" / "global_step_1" / weights).samefile(tmp_path / "global_step_1" / weights)

    def no_links(source: str, target: str) -> None:
        raise PermissionError(source)

    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, 2)
    assert keep_if_best(tmp_path, 2, 0.2)
    assert not (tmp_path / "best" / "global_step_2" / weights).samefile(tmp_path / "global_step_2" / weights)


@pytest.mark.parametrize("killed_at", range(6))
def test_a_kill_leaves_the_old_best_or_the_new_one(tmp_path, monkeypatch, killed_at):
    save(tmp_path, 1)
    keep_if_best(tmp_path, 1, 0.1)
    save(tmp_path, 2)
    calls = iter(range(100))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(best.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(best.shutil, "copytree", dying(shutil.copytree))
        patch.setattr(Path, "rename", dying(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            keep_if_best(tmp_path, 2, 0.2)
    keep_if_best(tmp_path, 3, 0.9)  # the next look: nothing was saved at step 3
    assert kept(tmp_path) in ((1, "weights 1"), (2, "weights 2"))
    keep_if_best(tmp_path, 2, 0.2)
    assert kept(tmp_path) == (2, "weights 2")
