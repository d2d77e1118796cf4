# SPDX-License-Identifier: Apache-2.0
"""Every change this package makes to upstream code at run time, one function each.

A patch refuses another release than it is for (PluginError), can be applied twice, and has a test that fails when
upstream no longer needs it. What is patched stands in `compat.TABLE`. Subclasses, configuration and documented
extension points come first; there are six patches.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms.compat import TRANSFORMERS_VERSION, VERL_VERSION, VLLM_VERSION, require_version
from embedrl_verl.platforms.ports import some_ports
from embedrl_verl.platforms.vision import embed_with_media

VISION_MODULES = tuple(
    f"transformers.models.{name}.modeling_{name}" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
)


def _patch(package: str, release: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The decorated function is for one release of a package."""

    def guard(apply: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(apply)
        def guarded(*args: Any) -> None:
            found = importlib.import_module(package).__version__
            require_version(package, found, release, f"the patch {apply.__name__}")
            apply(*args)

        return guarded

    return guard


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in a function's place, once."""
    original = getattr(owner, name)
    if original.__module__ != __name__:
        setattr(owner, name, functools.wraps(original, assigned=("__name__", "__doc__"))(make(original)))


@_patch("vllm", VLLM_VERSION)
def keep_cpu_linear_weights() -> None:
    """vLLM CPU: keep the weight of a linear layer after it has been packed for oneDNN.

    vLLM 0.24.0 packs the weight and then replaces `layer.weight` by an empty tensor, so weights of a later step
    cannot be loaded into it. The packed copy is still the one used: verl runs `process_weights_after_loading` after
    every weight sync, which packs again. Costs one copy of the model. Call it in a vLLM worker before the model is
    loaded.
    """
    from vllm.model_executor.layers import utils

    def keeping(original: Any) -> Any:
        return lambda layer, remove_weight: original(layer, remove_weight=False)

    _replace(utils, "dispatch_cpu_unquantized_gemm", keeping)


@_patch("vllm", VLLM_VERSION)
def rewind_cpu_generators() -> None:
    """vLLM CPU: let the prompt of a request with a seed be read in parts.

    What is sampled for a prompt that is not complete yet is thrown away, and vLLM 0.24.0 sets the request's generator
    back by moving an offset that only GPU generators have: on a CPU the engine dies. Here the generator gets back the
    state that it had after the last token that was kept, or its seed. Call it in a vLLM worker before any request.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def rewinding(original: Any) -> Any:
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

        return bookkeeping

    _replace(GPUModelRunner, "_bookkeeping_sync", rewinding)


@_patch("verl", VERL_VERSION)
def choose_master_ports_that_stay_free() -> None:
    """verl: let ranks of a worker group meet at a port that no other process is given meanwhile.

    verl 0.9.1 takes any free port before it starts the ranks, which listen there some ten seconds later: now and then
    a run dies of "address already in use" while it starts. A worker group can be given a range of ports to choose from,
    but verl's trainers pass none on; here it is one outside the system's own range. Call it in the process that makes
    worker groups.
    """
    from verl.single_controller.ray import RayWorkerGroup

    def within_a_range(original: Any) -> Any:
        def get_master_addr_port(self: Any, pg: Any, bundle_index: int = 0, master_port_range: Any = None) -> None:
            ports = some_ports()
            original(self, pg, bundle_index, master_port_range or [ports.start, ports.stop])

        return get_master_addr_port

    _replace(RayWorkerGroup, "_get_master_addr_port", within_a_range)


@_patch("verl", VERL_VERSION)
def run_the_vision_model_once() -> None:
    """verl: one run of the vision model a micro-batch, whatever media it has (none, images, videos, both).

    verl 0.9.1 runs it once for images, once for videos, and once on a blank image for a batch without media. Under FSDP
    each run gathers weights with the other ranks, so ranks whose micro-batches hold other kinds of media wait for each
    other for ever; and for Qwen2-VL and Qwen2.5-VL the blank image fails with transformers 5. Call it in an actor's
    process before its model is made.
    """
    from verl.models.transformers import qwen2_vl, qwen3_vl

    qwen2_vl._get_input_embeds = _qwen2_input_embeds
    qwen3_vl._get_input_embeds = _qwen3_input_embeds


def _qwen2_input_embeds(model: Any, input_ids: Any, attention_mask: Any = None, *media: Any) -> tuple[Any, Any]:
    embeds, mask, _ = _input_embeds(model, input_ids, attention_mask, media)
    return embeds, mask


def _qwen3_input_embeds(model: Any, input_ids: Any, attention_mask: Any = None, *media: Any) -> dict[str, Any]:
    embeds, mask, deepstack = _input_embeds(model, input_ids, attention_mask, media)
    none = {"visual_pos_masks": None, "deepstack_visual_embeds": None}
    return {"inputs_embeds": embeds, "attention_mask": mask, **none, **deepstack}


def _input_embeds(model: Any, input_ids: Any, mask: Any, media: tuple[Any, ...]) -> tuple[Any, Any, dict[str, Any]]:
    names = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")  # in verl's order
    held = {name: value for name, value in zip(names, media, strict=True) if value is not None}
    embeds, deepstack = embed_with_media(model, input_ids, held, always_run_vision=True)
    return embeds, mask if mask is None else mask.to(embeds.device), deepstack


@_patch("verl", VERL_VERSION)
def compute_log_probs_in_the_head() -> None:
    """verl: run the fused log-probs (`use_fused_kernels`, backend torch) inside the forward pass of `lm_head`.

    verl 0.9.1 takes `lm_head.weight` from outside. FSDP2 gathers a module's weights for its own forward pass only, so
    for Qwen2-VL and Qwen2.5-VL that is a shard, which fails; for Qwen3-VL it is gathered by hand, and each rank keeps
    the gradient of its own rows. Call it before verl's engine makes a model.
    """
    from verl.models.transformers import qwen2_vl, qwen3_vl

    qwen2_vl.forward_with_torch_backend = functools.partialmethod(
        _fused_forward, qwen2_vl.qwen2_vl_forward, qwen2_vl.Qwen2VLCausalLMOutputForPPO
    )
    qwen3_vl.forward_with_torch_backend = functools.partialmethod(
        _fused_forward, lambda self, *args, **kwargs: self.model(*args, **kwargs), qwen3_vl.Qwen3VLCausalLMOutputForPPO
    )


def _fused_forward(
    self: Any,
    run_model: Any,
    output_class: Any,
    input_ids: Any = None,
    labels: Any = None,
    temperature: float = 1.0,
    shift_labels: Any = None,
    **kwargs: Any,
) -> Any:
    """The forward pass of a model class, with the arguments that verl's has."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    outputs = run_model(self, input_ids, **kwargs)
    if shift_labels is None:
        shift_labels = (input_ids if labels is None else labels).roll(-1, dims=-1)
    fused = FusedLinearForPPO(impl_backend=self._verl_fused_kernels_backend)
    head = self.lm_head
    if hasattr(head, "base_layer"):
        raise ConfigError(
            "fused log-probs leave out an adapter on lm_head; set actor_rollout_ref.model.use_fused_kernels=False, or "
            "leave lm_head out of actor_rollout_ref.model.target_modules"
        )
    head.forward = lambda hidden: fused(hidden, head.weight, shift_labels, temperature)
    try:
        log_probs, entropy = head(outputs[0])
    finally:
        del head.forward
    return output_class(log_probs=log_probs, entropy=entropy, hidden_states=outputs.hidden_states)


@_patch("transformers", TRANSFORMERS_VERSION)
def give_vision_rows_at_once(name: str) -> None:
    """transformers: hand the attention `name` all images (or windows) of a vision model in one call.

    transformers 5.9.0 does so for attentions whose name holds "flash"; others are called once for each image, for
    Qwen2.5-VL once for each window of 8 x 8 patches.
    """

    def asking_by_name(original: Any) -> Any:
        def takes_bounds(config: Any = None, *args: Any, **kwargs: Any) -> bool:
            return getattr(config, "_attn_implementation", None) == name or original(config, *args, **kwargs)

        return takes_bounds

    for module in VISION_MODULES:
        _replace(importlib.import_module(module), "is_flash_attention_requested", asking_by_name)


@_patch("verl", VERL_VERSION)
def keep_attention_of_transformers() -> None:
    """verl: leave the attention layers of Qwen2-VL and Qwen2.5-VL as they are, unless flash-attn is asked for.

    For packed rows verl 0.9.1 puts a forward of its own in their place, which calls flash-attn directly and fails
    without it. That of transformers 5 packs rightly by itself. Call it before verl's engine makes a model.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention
    from verl.models.transformers import qwen2_vl

    own = {one: one.forward for one in (Qwen2_5_VLAttention, Qwen2VLAttention)}

    def choosing(of_verl: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = of_verl if "flash" in self.config._attn_implementation else own[type(self)]
            return chosen(self, *args, **kwargs)

        return forward

    _replace(qwen2_vl, "qwen2_vl_attn_forward", choosing)
