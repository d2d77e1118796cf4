# SPDX-License-Identifier: Apache-2.0
"""The trainer mode `plain_sync`, and what every mode of this package shares: worker classes and a claim on verl's
sockets for weights.
"""

from __future__ import annotations

from typing import Any

import ray
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from embedrl_verl.platforms import plugin
from embedrl_verl.platforms.claims import claim_weight_sockets
from embedrl_verl.platforms.training_worker import use_nested_position_ids_workers


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
