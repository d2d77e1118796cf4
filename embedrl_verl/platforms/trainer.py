# SPDX-License-Identifier: Apache-2.0
"""The trainer mode `plain_sync`, and what every mode of this package shares: worker classes and a claim on verl's
sockets for weights.

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
from typing import IO, Any

import ray
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import plugin
from embedrl_verl.platforms.training_worker import use_nested_position_ids_workers

logger = logging.getLogger(__name__)

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


class WorkerClassesMixin:
    """Before one of verl's trainer classes: swaps the worker classes, and holds the sockets for weights as long as the
    trainer lives.
    """

    role_worker_mapping: dict[Any, Any]

    def _init_resource_pool_mgr(self) -> None:
        self._weight_sockets = claim_weight_sockets(ray.get_runtime_context().get_job_id())
        super()._init_resource_pool_mgr()  # type: ignore[misc]  # verl's trainer follows in the MRO
        use_nested_position_ids_workers(self.role_worker_mapping)


@register_trainer("plain_sync")
class PlainSyncTrainer(WorkerClassesMixin, PPOTrainerSync):
    """verl's own synchronous trainer with this package's worker classes and nothing else: plain GRPO on a CPU, and on
    GPUs the baseline that EG-RL's step time is compared with.
    """

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # verl compares the mode with this literal
        super().__init__(config=config)


plugin.add_trainers(__name__)
