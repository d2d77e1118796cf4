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
        newest: the last step that is complete (verl's tracker names it); later ones are still being written, or belong
            to a run that was gone back behind, and stay.
        keep: None, 0 or less = all.

    Returns:
        What was removed.
    """
    if keep is None or keep < 1:
        return []
    found = {int(match[1]): one for one in Path(folder).glob("global_step_*") if (match := _STEP.fullmatch(one.name))}
    mine = sorted(
        step
        for step, one in found.items()
        if step <= newest and not one.is_symlink() and (one / RECORD).is_file() and any(map(_is_own, _parts(one)))
    )
    removed = [part for step in mine[:-keep] for part in _parts(found[step]) if _is_own(part)]
    for part in removed:
        shutil.rmtree(part)
    return removed


def _parts(step: Path) -> list[Path]:
    return [step / part for part in WEIGHTS]


def _is_own(part: Path) -> bool:
    """A folder, and no link to somebody else's."""
    return part.is_dir() and not part.is_symlink()
