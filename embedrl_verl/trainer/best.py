# SPDX-License-Identifier: Apache-2.0
"""Keeps the checkpoint with the best validation, whatever `trainer.max_actor_ckpt_to_keep` takes away.

CHECKPOINTS/best/global_step_N/    the same files (hard links where the file system has them, else copies)
CHECKPOINTS/best/score.json        {"step": N, "hit@1": of the validation after that step}

It is exported and resumed from as any other: `embedrl export CHECKPOINTS/best/global_step_N`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from embedrl_verl.data.disk import TRACKER

BEST, SCORE, METRIC = "best", "score.json", "hit@1"
_NEW, _OLD = ".best.new", ".best.old"


def keep_if_best(checkpoints: str | Path, step: int, hit1: float) -> bool:
    """Keep the checkpoint of a step that has been validated, if there is one and none before scored as high.

    A process that is killed at any point leaves the old best or the new one; verl's own folders are only read.

    Args:
        checkpoints: verl's `trainer.default_local_dir`.
        hit1: mean over data sources, in [0, 1].

    Returns:
        Whether it was kept.
    """
    root = Path(checkpoints)
    best, new, old, folder = root / BEST, root / _NEW, root / _OLD, root / f"global_step_{step}"
    if old.is_dir() and not best.exists():  # killed between the two renames
        old.rename(best)
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() != str(step) or hit1 <= best_score(root):
        return False
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, new / folder.name, copy_function=_link_or_copy)
    (new / SCORE).write_text(json.dumps({"step": step, METRIC: hit1}))
    if best.exists():
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)
    return True


def best_score(checkpoints: Path) -> float:
    """Hit@1 of the checkpoint that is kept; -1 without one."""
    file = checkpoints / BEST / SCORE
    return float(json.loads(file.read_text())[METRIC]) if file.is_file() else -1.0


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here
        shutil.copy2(source, target)
