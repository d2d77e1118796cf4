# SPDX-License-Identifier: Apache-2.0
"""A claim on the sockets through which verl hands weights to the vLLM servers of its own machine.

verl 0.9.1 names them after the Ray job (`/tmp/rl-colocate-zmq-JOB-replica-R-rank-L.sock`), and the first job of every
Ray cluster has the same number. Two runs on one machine that each start a cluster of their own would therefore use the
same sockets: one would delete those of the other, or its servers would get the other's weights. The claim makes the
second run wait, and then stop with an error.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

from embedrl_verl.errors import ResourceError

logger = logging.getLogger(__name__)

SOCKETS = Path("/tmp")
"""verl's folder for the sockets; not a setting there."""


def claim_weight_sockets(job: str, *, folder: Path = SOCKETS, wait_s: float = 60.0) -> IO[bytes]:
    """Claim the sockets of a Ray job for as long as the returned file is open; the end of the process gives it back.

    Args:
        job: Ray's job id, as `ray.get_runtime_context().get_job_id()` writes it.
        folder: where the sockets lie.
        wait_s: how long to wait for a run that is just ending.

    Raises:
        ResourceError: another run on this machine holds them.
    """
    path = folder / f"rl-colocate-zmq-{job}.embedrl.lock"
    file = _open(path)
    if _lock(file):
        return file
    logger.warning("another run on this machine holds %s; waiting up to %.0f s for its end", path, wait_s)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, wait_s / 10))
        if _lock(file):
            return file
    file.close()
    raise ResourceError(
        f"another run on this machine, in a Ray cluster of its own, has the job id {job} too and so the same sockets "
        f"for weights ({path} is locked; verl 0.9.1 names them after the job). Wait until it ends, or give one a "
        "/tmp of its own (a container)"
    )


def _open(path: Path) -> IO[bytes]:
    """The lock's file, made if it is missing. A file of another user can be read only, which is enough to lock it."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT, 0o644), "rb")


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
