# SPDX-License-Identifier: Apache-2.0
"""`trainer.max_actor_ckpt_to_keep` over the whole run: verl's managers forget at every start what they saved before."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from embedrl_verl.trainer.checkpoint import RECORD

_STEP = re.compile(r"global_step_(\d+)")
WEIGHTS = ("actor", "embedder")
"""What verl's managers would remove; the small files of a step stay, as they do there."""


def prune_checkpoints(folder: str | Path, newest: int, keep: int | None) -> list[Path]:
    """Remove the weights of a run's steps but the `keep` newest ones.

    Args:
        folder: the run's checkpoints; only steps with this package's record in them are looked at.
        newest: the step that has just been saved; later ones belong to a run that was gone back behind, and stay.
        keep: None or 0 = all.

    Returns:
        What was removed.
    """
    if not keep:
        return []
    found = {int(match[1]): one for one in Path(folder).glob("global_step_*") if (match := _STEP.fullmatch(one.name))}
    mine = sorted(
        step
        for step, one in found.items()
        if step <= newest and (one / RECORD).is_file() and any((one / part).is_dir() for part in WEIGHTS)
    )
    removed = [found[step] / part for step in mine[:-keep] for part in WEIGHTS if (found[step] / part).is_dir()]
    for part in removed:
        shutil.rmtree(part)
    return removed
