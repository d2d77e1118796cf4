# SPDX-License-Identifier: Apache-2.0
"""The changes of verl's and transformers' models are still needed, and refuse another release.

What they compute is tested in test_actor.py. The day upstream mends one of these, its test here fails and the patch can
go.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.utils.generic import is_flash_attention_requested

from embedrl_verl.embedder.batching import RowBatch, pack_rows
from embedrl_verl.embedder.processor import EmbedProcessor, Encoded
from embedrl_verl.errors import MediaError, PluginError
from embedrl_verl.platforms import patches, varlen
from embedrl_verl.platforms.vision import embed_with_media
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, mixed_inputs

MEDIA = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


def as_upstream_has_it(name: str) -> ModuleType:
    """A fresh copy of a module, whatever has been changed in the loaded one."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
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
def upstream(model) -> ModuleType:
    name = "qwen3_vl" if model.config.model_type == "qwen3_vl" else "qwen2_vl"
    return as_upstream_has_it(f"verl.models.transformers.{name}")


@pytest.fixture
def rows(checkpoint) -> list[Encoded]:
    processor = EmbedProcessor.from_pretrained(checkpoint, limits=LIMITS[checkpoint.name])
    return [processor.encode(one) for one in mixed_inputs(4)]


def vision_calls(inner: torch.nn.Module) -> list[int]:
    """Patches of each call of the vision model from now on."""
    calls: list[int] = []
    inner.visual.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    return calls


def media_of(packed: RowBatch) -> list[torch.Tensor | None]:
    return [packed.media.get(name) for name in MEDIA]


def test_verl_still_runs_the_vision_model_once_for_each_kind_of_medium(model, upstream, rows):
    calls, packed = vision_calls(model.model), pack_rows(rows)
    upstream._get_input_embeds(model.model, packed.input_ids, None, *media_of(packed))
    assert len(calls) == 2


@pytest.mark.parametrize("checkpoint", ["qwen2_vl", "qwen2_5_vl"], indirect=True)
def test_verl_still_fails_on_a_micro_batch_without_media(model, upstream, rows):
    with pytest.raises(AttributeError, match="mean"):
        upstream._get_input_embeds(model.model, pack_rows(rows[:1]).input_ids)


@pytest.mark.parametrize("kinds", [(0,), (1,), (3,), (0, 1, 2, 3)])
def test_the_vision_model_runs_once_whatever_the_media(model, rows, kinds):
    calls, packed = vision_calls(model.model), pack_rows([rows[kind] for kind in kinds])
    patch = patches._qwen3_input_embeds if model.config.model_type == "qwen3_vl" else patches._qwen2_input_embeds
    patch(model.model, packed.input_ids, None, *media_of(packed))
    assert len(calls) == 1


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


@pytest.mark.parametrize(
    ("patch", "release"),
    [
        (patches.run_the_vision_model_once, "VERL_VERSION"),
        (patches.compute_log_probs_in_the_head, "VERL_VERSION"),
        (patches.keep_attention_of_transformers, "VERL_VERSION"),
        (lambda: patches.give_vision_rows_at_once(varlen.NAME), "TRANSFORMERS_VERSION"),
    ],
)
def test_another_release_is_refused(patch, release, monkeypatch):
    monkeypatch.setattr(patches, release, "9.9.9")
    with pytest.raises(PluginError, match="is written for .* 9.9.9; found"):
        patch()
