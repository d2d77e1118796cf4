# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker extensions for weight sync, chosen by a key of the platform's configuration:

`actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=embedrl_verl.platforms.vllm_worker.<class>`
"""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from embedrl_verl.platforms.patches import keep_cpu_linear_weights, rewind_cpu_generators


def clear_deepstack(model: Any) -> float:
    """Zero what a Qwen3-VL model of vLLM keeps between prompts; other models have nothing.

    Returns:
        The largest absolute value that was there.
    """
    largest = 0.0
    for tensor in getattr(model, "deepstack_input_embeds", None) or ():
        largest = max(largest, float(tensor.abs().nan_to_num(nan=torch.inf).max()))
        tensor.zero_()
    return largest


class GpuColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, safe for a Qwen3-VL that has slept.

    vLLM 0.24 keeps the visual features of its deepstack in plain tensors, which are neither weights nor buffers.
    Level-2 sleep discards them, and nothing writes them anew: a prompt without pictures would then add whatever the
    memory holds to its hidden states (vllm#53343, #29341). They are cleared with every weight sync.
    """

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        super().update_weights_from_ipc(*args, **kwargs)
        for model in self._iter_all_models():
            clear_deepstack(model)


class CpuColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, safe for a CPU: see the two patches.

    Received weights are copied out of the shared-memory bucket. On a GPU `.to(device)` makes that copy; on a CPU it
    returns a view of a buffer that the sender overwrites and unlinks, and vLLM keeps some of the tensors it is given.
    """

    def __new__(cls, **kwargs: Any) -> CpuColocateWorkerExtension:
        keep_cpu_linear_weights()
        rewind_cpu_generators()
        return super().__new__(cls, **kwargs)

    def _update_weights(self, weights: list[tuple[str, torch.Tensor]], peft_config: dict, base_sync_done: bool) -> None:
        owned = [(name, tensor.clone()) for name, tensor in weights]
        super()._update_weights(owned, peft_config=peft_config, base_sync_done=base_sync_done)
