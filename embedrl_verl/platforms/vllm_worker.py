# SPDX-License-Identifier: Apache-2.0
"""The vLLM worker extension for weight sync on a CPU, chosen by a config key:

`+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=embedrl_verl.platforms.vllm_worker.CpuColocateWorkerExtension`

Three things differ from verl's own extension. Linear layers keep their weights after packing
(patches.keep_cpu_linear_weights). Requests with a seed may be read in parts (patches.rewind_cpu_generators). Received
weights are copied out of the shared-memory bucket: on a GPU `.to(device)`
makes that copy, on a CPU it returns a view of a buffer that the sender overwrites and unlinks, and vLLM keeps some of
the tensors it is given.
"""

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from embedrl_verl.platforms.patches import keep_cpu_linear_weights, rewind_cpu_generators


class CpuColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, safe for a CPU."""

    def __new__(cls, **kwargs: Any) -> "CpuColocateWorkerExtension":
        keep_cpu_linear_weights()
        rewind_cpu_generators()
        return super().__new__(cls, **kwargs)

    def _update_weights(self, weights: list[tuple[str, torch.Tensor]], peft_config: dict, base_sync_done: bool) -> None:
        owned = [(name, tensor.clone()) for name, tensor in weights]
        super()._update_weights(owned, peft_config=peft_config, base_sync_done=base_sync_done)
