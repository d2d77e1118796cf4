# SPDX-License-Identifier: Apache-2.0
"""A claim on verl's sockets for weights.

verl 0.9.1 (`_get_zmq_handle`) names the sockets through which it hands weights to the vLLM servers of a machine after
the Ray job: `/tmp/rl-colocate-zmq-JOB-replica-R-rank-L.sock`. The first job of every Ray cluster has the same number.
Two runs on one machine that each start a cluster of their own would use the same sockets: one would delete those of the
other, or its servers would get the other's weights. The claim makes the second run wait, and then stop with an error.
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

FIRST_JOB = "01000000"
"""Ray's number of the first job of every cluster."""
SOCKETS = Path("/tmp")
"""verl's folder for the sockets; not a setting there."""
POLL_S = 0.5


def claim_weight_sockets(job: str, *, folder: Path = SOCKETS, wait_s: float = 60.0) -> IO[bytes]:
    """Claim the sockets of a Ray job for as long as the returned file is open; the end of the process gives it back.

    Args:
        job: Ray's job id, as `ray.get_runtime_context().get_job_id()` writes it.
        wait_s: how long to wait for a run that is just ending.
    """
    path = folder / f"rl-colocate-zmq-{job}.embedrl.lock"
    # A file of another user can be read only, which is enough to lock it.
    file = os.fdopen(os.open(path, os.O_RDONLY | (0 if path.exists() else os.O_CREAT), 0o644), "rb")
    for attempt in range(1 + int(wait_s / POLL_S)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if attempt == 0:
                logger.warning("another run on this machine holds %s; waiting up to %.0f s for its end", path, wait_s)
            time.sleep(min(POLL_S, wait_s))
    file.close()
    raise ResourceError(
        f"another run on this machine, in a Ray cluster of its own, has the job id {job} too and so the same sockets "
        f"for weights ({path} is locked; verl 0.9.1 names them after the job). Wait until it ends, or give one a "
        "/tmp of its own (a container)"
    )
