# SPDX-License-Identifier: Apache-2.0
"""Every change this package makes to upstream code at run time, one function each.

A patch names the upstream release it is for, refuses any other (PluginError), can be applied twice, and has a test
that fails when upstream no longer needs it. Prefer subclassing, configuration and documented extension points; there
are two patches today.
"""

import functools
from typing import Any

from embedrl_verl.platforms.versions import VLLM_VERSION, require_version


def keep_cpu_linear_weights() -> None:
    """vLLM CPU: keep the weight of a linear layer after it has been packed for oneDNN.

    vLLM 0.24.0 packs the weight and then replaces `layer.weight` by an empty tensor, so weights of a later step
    cannot be loaded into it. The packed copy is still the one used: verl runs `process_weights_after_loading` after
    every weight sync, which packs again. Costs one copy of the model. Call it in a vLLM worker before the model is
    loaded.
    """
    import vllm
    from vllm.model_executor.layers import utils

    require_version("vllm", vllm.__version__, VLLM_VERSION, "the patch keep_cpu_linear_weights")
    original = utils.dispatch_cpu_unquantized_gemm
    if original.__module__ == __name__:
        return

    @functools.wraps(original, assigned=("__name__", "__doc__"))
    def dispatch_keeping_weight(layer, remove_weight: bool) -> None:  # type: ignore[no-untyped-def]
        original(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = dispatch_keeping_weight


def rewind_cpu_generators() -> None:
    """vLLM CPU: let the prompt of a request with a seed be read in parts.

    What is sampled for a prompt that is not complete yet is thrown away, and vLLM 0.24.0 sets the request's generator
    back by moving an offset that only GPU generators have: on a CPU the engine dies. Here the generator gets back the
    state that it had after the last token that was kept, or its seed. Call it in a vLLM worker before any request.
    """
    import vllm
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    require_version("vllm", vllm.__version__, VLLM_VERSION, "the patch rewind_cpu_generators")
    original = GPUModelRunner._bookkeeping_sync
    if original.__module__ == __name__:
        return

    @functools.wraps(original, assigned=("__name__", "__doc__"))
    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        discarded = {int(index) for index in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]}
        generators = dict(batch.generators)
        for index in discarded & generators.keys():
            del batch.generators[index]
        result = original(self, *args, **kwargs)
        for index, generator in generators.items():
            batch.generators[index] = generator
            request = self.requests[batch.req_ids[index]]
            if index not in discarded:
                request.embedrl_generator_state = generator.get_state()
            elif hasattr(request, "embedrl_generator_state"):
                generator.set_state(request.embedrl_generator_state)
            else:
                generator.manual_seed(generator.initial_seed())
        return result

    GPUModelRunner._bookkeeping_sync = bookkeeping
