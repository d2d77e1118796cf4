# SPDX-License-Identifier: Apache-2.0
"""Each change of upstream does its work, refuses another release, and is still needed: the day upstream mends one, its
`still` test fails and the patch can go. What the model patches compute is tested in test_actor.py.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.utils.generic import is_flash_attention_requested
from verl.single_controller.ray import RayWorkerGroup
from verl.trainer.ppo.v1 import trainer_base

from embedrl_verl.embedder.batching import pack_rows
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.errors import MediaError, PluginError
from embedrl_verl.platforms import patches, ports, varlen
from embedrl_verl.platforms.vision import embed_with_media
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, mixed_inputs

vllm = pytest.importorskip("vllm")

from vllm.model_executor.layers import utils  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402

on_cpu_build = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
MEDIA = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


@pytest.mark.parametrize(
    ("patch", "package"),
    [
        *((one, "vllm") for one in (patches.keep_cpu_linear_weights, patches.rewind_cpu_generators)),
        (patches.choose_master_ports_that_stay_free, "verl"),
        (patches.run_the_vision_model_once, "verl"),
        (patches.compute_log_probs_in_the_head, "verl"),
        (patches.keep_attention_of_transformers, "verl"),
        (lambda: patches.give_vision_rows_at_once(varlen.NAME), "transformers"),
    ],
)
def test_another_release_is_refused(patch, package, monkeypatch):
    monkeypatch.setattr(f"{package}.__version__", "9.9.9")
    with pytest.raises(PluginError, match=f"the patch .* is written for {package} .*; found 9.9.9"):
        patch()


# ------------------------------------------------------------------ vLLM on a CPU


@pytest.fixture
def kernels(monkeypatch):
    """Undoes a patch after the test."""
    current_platform.import_kernels()
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64, bias=False).requires_grad_(False)


@on_cpu_build
def test_upstream_still_empties_packed_weights(kernels):
    layer = linear()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


@on_cpu_build
def test_weights_can_be_loaded_again_after_packing(kernels):
    patches.keep_cpu_linear_weights()
    patches.keep_cpu_linear_weights()
    layer, x = linear(), torch.randn(3, 64)
    for _step in range(2):
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ layer.weight.T)
        layer.weight.data.copy_(torch.randn(64, 64))


@on_cpu_build
def test_upstream_still_moves_an_offset_that_cpu_generators_do_not_have():
    assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


class Runner:
    """Two requests with seeds in vLLM's model runner; each step draws a number for each, and some are thrown away."""

    def __init__(self):
        self.requests = {name: SimpleNamespace() for name in "ab"}
        generators = {index: torch.Generator().manual_seed(index) for index in range(2)}
        self.input_batch = SimpleNamespace(num_reqs=2, req_ids=["a", "b"], generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.zeros(4, dtype=bool))

    def step(self, *discarded):
        self.discard_request_mask.np[:2] = [index in discarded for index in range(2)]
        drawn = [torch.rand(3, generator=self.input_batch.generators[index]).tolist() for index in range(2)]
        GPUModelRunner._bookkeeping_sync(self)
        return drawn


def test_a_draw_that_is_thrown_away_changes_nothing(monkeypatch):
    """Before the first token, and after some (a request that was pushed out and comes back)."""

    def as_upstream(self):
        for index in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]:
            generator = self.input_batch.generators.get(int(index))
            if generator is not None:
                generator.set_offset(generator.get_offset() - 4)

    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", as_upstream)
    patches.rewind_cpu_generators()
    patches.rewind_cpu_generators()
    plain, rewound = Runner(), Runner()
    expected = [plain.step() for _ in range(3)]
    rewound.step(0, 1)
    assert rewound.step(1)[0] == expected[0][0]
    assert rewound.step(0)[1] == expected[0][1]
    assert rewound.step() == expected[1]
    rewound.step(0, 1)
    assert rewound.step() == expected[2]
    assert set(rewound.input_batch.generators) == {0, 1}


# ------------------------------------------------------------------ verl's ports


def test_upstreams_trainers_still_pass_no_range_on():
    assert "master_port_range" not in inspect.getsource(trainer_base)
    assert 's.bind(("", 0))' in inspect.getsource(inspect.getmodule(RayWorkerGroup))
    # Importing verl's trainers, as above, is what the plugin waits for.
    assert RayWorkerGroup._get_master_addr_port.__module__ == patches.__name__


def test_ranks_of_a_worker_group_meet_outside_the_range_of_the_system(tmp_path, monkeypatch):
    asked = []

    def _get_master_addr_port(self, pg, bundle_index=0, master_port_range=None):
        asked.append(master_port_range)

    monkeypatch.setattr(RayWorkerGroup, "_get_master_addr_port", _get_master_addr_port)
    patches.choose_master_ports_that_stay_free()
    once = RayWorkerGroup._get_master_addr_port
    patches.choose_master_ports_that_stay_free()
    assert RayWorkerGroup._get_master_addr_port is once
    (tmp_path / "range").write_text("32768\t60999\n")
    monkeypatch.setattr(ports, "_LINUX", tmp_path / "range")
    group = object.__new__(RayWorkerGroup)
    group._get_master_addr_port("pg", bundle_index=0, master_port_range=None)
    group._get_master_addr_port("pg", master_port_range=[40000, 40010])
    [(first, stop), given] = asked
    assert 20000 <= first < 32768 == stop and given == [40000, 40010]


# ------------------------------------------------------------------ models


def as_upstream_has_it(name: str) -> ModuleType:
    """A fresh copy of a module, whatever has been changed in the loaded one."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request, tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / request.param, family=request.param)


@pytest.fixture
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def rows(checkpoint):
    processor = EmbedProcessor.from_pretrained(checkpoint, limits=LIMITS[checkpoint.name])
    return [processor.encode(one) for one in mixed_inputs(4)]


def run_input_embeds(module: ModuleType, model: torch.nn.Module, rows: list) -> list[int]:
    """verl's function (or ours in its place) on packed rows: patches of each call of the vision model."""
    calls, packed = [], pack_rows(rows)
    model.model.visual.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    module._get_input_embeds(model.model, packed.input_ids, None, *map(packed.media.get, MEDIA))
    return calls


def verls_module(model: torch.nn.Module) -> str:
    return f"verl.models.transformers.{'qwen3_vl' if model.config.model_type == 'qwen3_vl' else 'qwen2_vl'}"


def test_verl_still_runs_the_vision_model_once_for_each_kind_of_medium(model, rows):
    upstream = as_upstream_has_it(verls_module(model))
    assert len(run_input_embeds(upstream, model, rows)) == 2
    if model.config.model_type != "qwen3_vl":
        with pytest.raises(AttributeError, match="mean"):  # a micro-batch without media
            upstream._get_input_embeds(model.model, pack_rows(rows[:1]).input_ids)


@pytest.mark.parametrize("kinds", [(0,), (1,), (3,), (0, 1, 2, 3)])
def test_the_vision_model_runs_once_whatever_the_media(model, rows, kinds):
    patches.run_the_vision_model_once()
    module = importlib.import_module(verls_module(model))
    assert len(run_input_embeds(module, model, [rows[kind] for kind in kinds])) == 1


def test_media_without_their_placeholders_are_an_error(model, rows):
    packed = pack_rows(rows)
    packed.media.pop("image_grid_thw")
    with pytest.raises(MediaError, match="visual tokens need as many placeholders"):
        embed_with_media(model.model, packed.input_ids, packed.media, always_run_vision=True)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_verls_attention_still_needs_flash_attn():
    module = as_upstream_has_it("verl.models.transformers.qwen2_vl")
    assert "_flash_use_top_left_mask" in inspect.getsource(module.qwen2_vl_attn_forward)
    assert not hasattr(module, "_flash_use_top_left_mask")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_verl_still_takes_the_weights_of_lm_head_from_outside(name):
    module = as_upstream_has_it(f"verl.models.transformers.{name}")
    assert "self.lm_head.weight" in inspect.getsource(module.forward_with_torch_backend)


def test_transformers_still_calls_other_attentions_once_an_image():
    assert not is_flash_attention_requested(SimpleNamespace(_attn_implementation=varlen.NAME))
    for name in patches.VISION_MODULES:
        spec = importlib.util.find_spec(name)
        assert "is_flash_attention_requested(self.config)" in Path(spec.origin).read_text()
