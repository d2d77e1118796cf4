# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP2 engines registered for the device `cpu`. They are plain torch and run on gloo; one thing must differ.

verl keeps a forward-only model (the reference policy, a frozen Embedder) behind FSDP2's CPU offload policy with
pinned memory. Pinning asks for a CUDA driver, and on a CPU there is nothing to offload from, so `ResidentOnCpuMixin`
builds the module without that policy. FSDP1 is not offered: it refuses CPU modules with sync_module_states.
"""

from typing import Any

from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead


class ResidentOnCpuMixin:
    """Before an FSDP engine class: on the platform `cpu`, a forward-only module is sharded like a trained one. No
    effect on a GPU.
    """

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        if get_device_name() != "cpu" or not self.engine_config.forward_only:
            return super()._build_fsdp_module(module)  # type: ignore[misc]  # verl's engine follows in the MRO
        self.engine_config.forward_only = False
        try:
            return super()._build_fsdp_module(module)  # type: ignore[misc]
        finally:
            self.engine_config.forward_only = True


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CpuEngineWithLMHead(ResidentOnCpuMixin, FSDPEngineWithLMHead):
    """verl's language-model engine on a CPU."""


@EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")
class CpuEngineWithValueHead(ResidentOnCpuMixin, FSDPEngineWithValueHead):
    """verl's critic engine on a CPU."""
