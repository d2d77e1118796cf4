# SPDX-License-Identifier: Apache-2.0
"""Errors of a disk that is full, digests of files, and verl's tracker of complete checkpoints."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedrl_verl.errors import DataError, ResourceError

CHUNK = 1 << 20
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file that names the last complete checkpoint of a folder of checkpoints."""
_STEP = re.compile(r"global_step_(\d+)")


def last_complete_step(checkpoints: Path) -> int | None:
    """The step that the tracker file names; None before the first."""
    tracker = checkpoints / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text else None  # empty: killed while it was written


def complete_steps(checkpoints: Path) -> dict[int, Path]:
    """Folders of the complete steps, oldest first. Later ones are still being written, or belong to a run that was gone
    back behind. Links are not among them."""
    newest = last_complete_step(checkpoints)
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("global_step_*")
        if (match := _STEP.fullmatch(path.name)) and not path.is_symlink()
    }
    return {step: steps[step] for step in sorted(steps) if newest is not None and step <= newest}


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turn what the system says of a disk that is full or cannot be written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{where}: the disk is full; what is finished is kept. Free space, then run the same command again"
            ) from error
        raise ResourceError(f"{where}: cannot be written ({error})") from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return digest.hexdigest()
