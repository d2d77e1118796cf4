# SPDX-License-Identifier: Apache-2.0
"""Trainer mode `plain_sync`: verl's own synchronous trainer with this package's worker classes and nothing else.

It runs plain GRPO on a CPU, and on GPUs it is the baseline that EG-RL's step time is compared with.
`WorkerClassesMixin` is also the base of this package's own modes.
"""

from typing import Any

import ray
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from embedrl_verl.platforms import plugin
from embedrl_verl.platforms.training_worker import use_nested_position_ids_workers
from embedrl_verl.platforms.weight_socket import claim_weight_sockets


class WorkerClassesMixin:
    """Mixin before one of verl's trainer classes: swaps the worker classes (see platforms.training_worker), and holds
    the sockets for weights as long as the trainer lives (see platforms.weight_socket)."""

    role_worker_mapping: dict[Any, Any]

    def _init_resource_pool_mgr(self) -> None:
        self._weight_sockets = claim_weight_sockets(ray.get_runtime_context().get_job_id())
        super()._init_resource_pool_mgr()  # type: ignore[misc]  # verl's trainer follows in the MRO
        use_nested_position_ids_workers(self.role_worker_mapping)


@register_trainer("plain_sync")
class PlainSyncTrainer(WorkerClassesMixin, PPOTrainerSync):
    """verl's PPOTrainerSync; the mode's literal is restored, because verl compares it with "sync"."""

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config=config)


plugin.add_trainers(__name__)
