# SPDX-License-Identifier: Apache-2.0
"""Every change this package makes to upstream code at run time, one function each.

A patch names the upstream release it is for, refuses any other (PluginError), can be applied twice, and has a test
that fails when upstream no longer needs it. Prefer subclassing, configuration and documented extension points; there
is one patch today.
"""

import functools

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
