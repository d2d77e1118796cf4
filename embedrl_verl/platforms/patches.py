# SPDX-License-Identifier: Apache-2.0
"""Every change this package makes to upstream code at run time, one function each.

A patch names the upstream release it is for, refuses any other (PluginError), can be applied twice, and has a test
that fails when upstream no longer needs it. Prefer subclassing, configuration and documented extension points; there
are three patches today.
"""

import functools
from typing import Any

from embedrl_verl.platforms.ports import some_ports
from embedrl_verl.platforms.versions import VERL_VERSION, VLLM_VERSION, require_version


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


def choose_master_ports_that_stay_free() -> None:
    """verl: let ranks of a worker group meet at a port that no other process is given meanwhile.

    verl 0.9.1 takes any free port before it starts the ranks, which listen there some ten seconds later: now and then
    a run dies of "address already in use" while it starts. A worker group can be given a range of ports to choose from,
    but verl's trainers pass none on; here it is one outside the system's own range. Call it in the process that makes
    worker groups.
    """
    import verl
    from verl.single_controller.ray import RayWorkerGroup

    require_version("verl", verl.__version__, VERL_VERSION, "the patch choose_master_ports_that_stay_free")
    original = RayWorkerGroup._get_master_addr_port
    if original.__module__ == __name__:
        return

    @functools.wraps(original, assigned=("__name__", "__doc__"))
    def get_master_addr_port(self: Any, pg: Any, bundle_index: int = 0, master_port_range: Any = None) -> None:
        if master_port_range is None:
            ports = some_ports()
            master_port_range = [ports.start, ports.stop]
        original(self, pg, bundle_index=bundle_index, master_port_range=master_port_range)

    RayWorkerGroup._get_master_addr_port = get_master_addr_port
