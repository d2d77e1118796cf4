# SPDX-License-Identifier: Apache-2.0
"""Estimated bytes are those of torch's memory tracker: layers at full width, and an update on verl's engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.families import Family
from embedrl_verl.platforms import varlen
from embedrl_verl.platforms.footprint import FP32, PUBLISHED, Fsdp, Megatron, shape_of
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from tests import processes
from tests.embedder.inputs import item, picture

TOKENS = 8192
TOLERANCE = 0.25
COUNTS = dict(zip(PUBLISHED, (8_291_375_616, 8_292_166_656, 8_767_123_696, 2_127_532_032), strict=True))


@pytest.mark.parametrize("path", PUBLISHED)
def test_parameters_of_the_default_models_are_the_published_numbers(path: str) -> None:
    assert shape_of(path).parameters == COUNTS[path]


def test_a_model_that_nothing_tells_of_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert shape_of("somebody/unknown") is shape_of(str(tmp_path)) is shape_of(str(tmp_path / "none")) is None


def activations(layer: Any, hidden: torch.Tensor, **given: Any) -> int:
    """Most bytes at one moment of a layer's pass, without its weights, their gradients and its input."""
    tracker = MemTracker()
    tracker.track_external(layer)
    with tracker, torch.set_grad_enabled(hidden.requires_grad):
        if hidden.requires_grad:
            out = checkpoint(layer, hidden, use_reentrant=False, **given)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        else:
            layer(hidden, **given)
    (found,) = tracker.get_tracker_snapshot("peak").values()
    return sum(int(size) for kind, size in found.items() if "ACT" in str(kind) or "TEMP" in str(kind))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", PUBLISHED)
def test_a_layer_at_full_width_takes_what_is_estimated(path: str, training: bool) -> None:
    """On tensors without storage, so that a model of eight billion parameters has room here."""
    varlen.register()
    shape, (family, values) = shape_of(path), PUBLISHED[path]
    small = {**values, "text_config": {**values["text_config"], "num_hidden_layers": 1, "vocab_size": 512}}
    config = AutoConfig.for_model(family, **small)
    config.get_text_config().rope_parameters["mrope_section"] = [16, 24, 24]

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        setattr(tensor, varlen._KNOWN, varlen.Rows(tensor, [TOKENS]))
        return tensor

    with FakeTensorMode():
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=varlen.NAME, dtype=torch.bfloat16)
        layer, block = model.model.language_model.layers[0], model.model.visual.blocks[0]
        axes = () if family == "qwen3_vl" else (3,)
        angles = torch.zeros(*axes, 1, TOKENS, layer.self_attn.head_dim, dtype=torch.bfloat16)
        hidden = torch.zeros(1, TOKENS, shape.hidden, dtype=torch.bfloat16, requires_grad=training)
        given = {"position_ids": rows(torch.arange(TOKENS)[None]), "attention_mask": None}
        found = activations(layer, hidden, position_embeddings=(angles, angles), **given)
        estimated = shape.layer_backward(TOKENS) if training else shape.layer_forward(TOKENS)
        assert estimated == pytest.approx(found, rel=TOLERANCE)

        angles = torch.zeros(TOKENS, shape.vision_hidden // 16)
        hidden = torch.zeros(TOKENS, shape.vision_hidden, dtype=torch.bfloat16, requires_grad=training)
        bounds = rows(torch.zeros(2, dtype=torch.int32))
        found = activations(block, hidden, cu_seqlens=bounds, position_embeddings=(angles, angles))
        visual = TOKENS // shape.patches
        estimated = shape.vision_backward(visual) if training else shape.vision_forward(visual)
        assert estimated == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("qwen2_5_vl", "qwen3_vl"))]
)
def test_an_actor_on_verls_engine_takes_what_is_estimated(family: Family, tmp_path: Path) -> None:
    folder = build_tiny_model(
        tmp_path / family, family=family, hidden_size=512, num_layers=4, vision_size=256, vision_layers=4
    )
    side = 32 if family == "qwen3_vl" else 28
    processor = EmbedProcessor.from_pretrained(folder, limits=MediaLimits(side, 1, 256, 1, 256))
    row = processor.encode(EmbedInput(item("here is a word " * 10, (picture(0, 16 * side, 16 * side),))))
    tokens, visual = 12 * len(row.input_ids), 12 * 256
    torch.save([row] * 12, tmp_path / "rows.pt")
    where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    script = [str(Path(__file__).with_name("actor_ranks.py")), "peak", str(folder), str(tmp_path / "rows.pt")]
    environment = {**CPU_ENV, **where, "MASTER_PORT": str(free_port())}
    code, text = processes.run([*script, str(tmp_path / "out.json")], tmp_path / "log.txt", environment)
    assert code == 0, text[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    shape = shape_of(str(folder))
    model = Fsdp(shape, shards=1, trained=shape.parameters, master=FP32, compute=FP32)
    resting = model.weights + model.optimizer
    update = resting + model.update(tokens, visual, fused=True, checkpointing=True)
    assert update == pytest.approx(found["update"], rel=TOLERANCE)
    assert resting + model.forward(tokens, visual) == pytest.approx(found["log_probs"], rel=TOLERANCE)


def test_shards_and_splits_divide_what_they_should() -> None:
    shape = shape_of("Qwen/Qwen3-VL-8B-Instruct")
    alone, eight = (Fsdp(shape, ranks, shape.parameters) for ranks in (1, 8))
    assert alone.weights + alone.optimizer == 12 * shape.parameters == 8 * (eight.weights + eight.optimizer)
    assert eight.gathered == alone.gathered > 0
    frozen = Fsdp(shape, 8, 0, master=2)
    assert (frozen.weights, frozen.optimizer) == (2 * shape.parameters // 8, 0)
    split = Megatron(shape, tensor=2, pipeline=2, ranks=16, trained=True)
    assert (split.weights, split.gradients) == (2 * shape.parameters // 4, 4 * shape.parameters // 4)
    assert split.optimizer == 12 * shape.parameters // 16


def test_whole_logits_cost_what_fused_ones_save() -> None:
    shape = shape_of("Qwen/Qwen2-VL-7B-Instruct")
    assert shape.loss(32768, fused=False) == 6 * 32768 * 152064
    assert shape.loss(32768, fused=True) < 2 * 1024**3 < 20 * 1024**3 < shape.loss(32768, fused=False)
