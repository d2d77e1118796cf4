# SPDX-License-Identifier: Apache-2.0
"""A run keeps as many checkpoints as it is told, and its best one, whenever it is killed; it touches nothing else."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from embedrl_verl.export.checkpoint import TRACKER, make_way, remove_half_written, writing
from embedrl_verl.trainer import checkpoint
from embedrl_verl.trainer.checkpoint import RECORD, keep_if_best, prune_to


def prune(root: Path, newest: int, keep: int | None) -> list[Path]:
    (root / TRACKER).write_text(str(newest))
    return prune_to(keep, root)


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
    removed = prune(tmp_path, 12, keep)
    assert with_weights(tmp_path) == sorted(f"global_step_{number}" for number in left)
    assert len(removed) == 2 * (3 - len(left))
    assert all((tmp_path / f"global_step_{number}" / "data.pt").is_file() for number in (2, 8, 12))
    assert prune(tmp_path, 12, keep) == []


def test_what_is_not_of_this_run_stays(tmp_path):
    step(tmp_path, 1, "actor")
    step(tmp_path, 4, "actor")
    step(tmp_path, 9, "actor")  # of a run that has gone back to step 4
    step(tmp_path, 2, "actor", record=False)
    (tmp_path / "global_step_3_mine" / "actor").mkdir(parents=True)
    step(tmp_path / "best", 1, "actor")
    assert prune(tmp_path, 4, 1) == [tmp_path / "global_step_1" / "actor"]
    assert with_weights(tmp_path) == ["global_step_2", "global_step_3_mine", "global_step_4", "global_step_9"]
    assert (tmp_path / "best" / "global_step_1" / "actor").is_dir()


def test_all_are_kept_without_a_number(tmp_path):
    step(tmp_path, 1, "actor")
    step(tmp_path, 2, "actor")
    assert prune(tmp_path, 2, None) == [] and len(with_weights(tmp_path)) == 2


def test_links_are_neither_followed_nor_removed(tmp_path):
    other = step(tmp_path / "other", 5, "actor")
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step_5").symlink_to(other)
    step(run, 6, "other")
    (run / "global_step_6" / "actor").symlink_to(other / "actor")
    step(run, 7, "actor")
    step(run, 8, "actor")
    assert prune(run, 8, 1) == [run / "global_step_7" / "actor"]
    assert (other / "actor").is_dir() and (run / "global_step_6" / "actor").is_symlink()


# ---------------------------------------------------------------------- the best one


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
        patch.setattr(checkpoint.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(checkpoint.shutil, "copytree", dying(shutil.copytree))
        patch.setattr(Path, "rename", dying(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            keep_if_best(tmp_path, 2, 0.2)
    keep_if_best(tmp_path, 3, 0.9)  # the next look: nothing was saved at step 3
    assert kept(tmp_path) in ((1, "weights 1"), (2, "weights 2"))
    keep_if_best(tmp_path, 2, 0.2)
    assert kept(tmp_path) == (2, "weights 2")


@pytest.mark.parametrize(
    ("step", "marked", "linked", "gone"),
    [(6, True, False, True), (6, False, False, False), (6, True, True, False), (5, True, False, False)],
    ids=["killed", "without a mark", "a link", "complete"],
)
def test_only_what_a_run_was_ended_in_the_middle_of_is_removed(tmp_path, step, marked, linked, gone):
    root = tmp_path / "checkpoints"
    folder = (tmp_path if linked else root) / f"global_step_{step}"
    with pytest.raises(OSError, match="full") if marked else nullcontext(), writing(folder):
        (folder / "weights.pt").touch()
        if marked:
            raise OSError("the disk is full")
    root.mkdir(exist_ok=True)
    if linked:
        (root / folder.name).symlink_to(folder)
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    assert remove_half_written(root) == ([folder] if gone else [])
    assert folder.exists() != gone and (gone or linked or [path.name for path in folder.iterdir()] == ["weights.pt"])
    assert remove_half_written(root) == []


@pytest.mark.parametrize("first", [False, True], ids=["one before", "none before"])
def test_a_step_that_is_written_again_is_not_half_of_the_old_and_leaves_the_best_alone(tmp_path, first):
    for number in (4,) if first else (2, 4):
        (step(tmp_path, number, "actor") / "actor" / "w.pt").write_text(f"old {number}")
    (tmp_path / TRACKER).write_text("4")
    assert keep_if_best(tmp_path, 4, 0.9)
    folder = tmp_path / "global_step_4"  # resumed at step 2 or anew, and now at 4 again
    make_way(folder)
    with pytest.raises(KeyboardInterrupt), writing(folder):
        (folder / "actor").mkdir()
        with (folder / "actor" / "w.pt").open("w") as file:
            file.write("new 4")
        raise KeyboardInterrupt
    assert (tmp_path / "best" / "global_step_4" / "actor" / "w.pt").read_text() == "old 4"
    assert remove_half_written(tmp_path) == [folder], "it is not taken as complete"
    assert not (tmp_path / TRACKER).exists() if first else (tmp_path / TRACKER).read_text() == "2"
    make_way(folder)  # nothing is there
    (tmp_path / "global_step_6").symlink_to(tmp_path / "best")
    make_way(tmp_path / "global_step_6")
    assert (tmp_path / "global_step_6").is_symlink()
