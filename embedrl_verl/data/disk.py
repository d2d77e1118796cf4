# SPDX-License-Identifier: Apache-2.0
"""Errors of a disk that is full, digests of files, and verl's tracker of complete checkpoints."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedrl_verl.errors import DataError, ResourceError

CHUNK = 1 << 20
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file that names the last complete checkpoint of a folder of checkpoints."""


def last_complete_step(checkpoints: Path) -> int | None:
    """The step that the tracker file names; None before the first."""
    tracker = checkpoints / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text else None  # empty: killed while it was written


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
