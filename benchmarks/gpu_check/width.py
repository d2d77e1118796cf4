# SPDX-License-Identifier: Apache-2.0
"""Layers at the width of the models that people train: time, share of the device's matrix work, and memory.

An actor's update (Qwen2-VL-7B, 32,768 packed tokens of text, 4 and 8 of its 28 layers) and an Embedder's pass (Qwen3-VL
2B, 16,384 tokens in rows of 512, all layers); memory beside what a plan estimates. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_check.stage import GIB, Figures, measure, need, share_of_peak

ACTOR, EMBEDDER = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-Embedding-2B"


def decoder(path: str, layers: int, device: str) -> Any:
    """The language part with random bfloat16 weights; small without CUDA."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from embedrl_verl.platforms import varlen
    from embedrl_verl.platforms.footprint import PUBLISHED

    varlen.register()
    family, values = PUBLISHED[path]
    text = {**values["text_config"], "num_hidden_layers": layers}
    if device != "cuda":
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vision = {**values["vision_config"], "depth": 1}  # not used
    config = AutoConfig.for_model(family, **{**values, "text_config": text, "vision_config": vision})
    size = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    config.get_text_config().rope_parameters["mrope_section"] = [size // 8, 3 * size // 16, 3 * size // 16]
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=varlen.NAME, dtype=torch.bfloat16)
    return model.model.language_model.train()


def packed(width: int, length: int, count: int, device: str, *, training: bool) -> dict[str, Any]:
    """`count` rows of `length` tokens in one sequence."""
    positions = torch.arange(length, device=device).repeat(count).expand(4, 1, -1)
    embeddings = torch.randn(1, count * length, width, device=device, dtype=torch.bfloat16, requires_grad=training)
    return {"inputs_embeds": embeddings, "position_ids": positions, "use_cache": False}


def flops_of(model: Any, length: int, count: int) -> float:
    """Matrix work of one forward pass."""
    weights = sum(one.numel() for layer in model.layers for one in layer.parameters() if one.dim() == 2)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 2 * length**2 * config.num_attention_heads * size * len(model.layers)
    return 2.0 * weights * length * count + scores * count


def update(device: str, figures: Figures) -> None:
    """Forward and backward passes with gradient checkpointing."""
    from embedrl_verl.platforms.footprint import shape_of

    length, count = (4096, 8) if device == "cuda" else (64, 2)
    for layers in (4, 8) if device == "cuda" else (1, 2):
        model = decoder(ACTOR, layers, device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = packed(model.config.hidden_size, length, count, device, training=True)

        def work(model: Any = model, rows: dict[str, Any] = rows) -> None:
            model(**rows).last_hidden_state.sum().backward()

        seconds, peak = measure(work, device, repeat=3)
        flops = 4 * flops_of(model, length, count)  # forward twice, backward
        figures.values[f"update, {layers} layers"] = {
            "s": round(seconds, 3),
            "tokens/s": round(length * count / seconds),
            "share of peak": share_of_peak(flops, seconds),
            "peak GiB over weights and gradients": round(peak, 2),
        }
        if device == "cuda":
            shape = shape_of(ACTOR)
            tokens = length * count
            kept = 2 * layers * tokens * shape.hidden
            ratio = (kept + shape.layer_backward(tokens)) / (peak * GIB)
            figures.keep(f"update, {layers} layers: estimate / measured", ratio, at_least=0.75, at_most=1.33)
        figures.keep(f"update, {layers} layers: gradient", float(rows["inputs_embeds"].grad.float().norm()))
        del model, rows


def embed(device: str, figures: Figures) -> None:
    """A forward pass of all layers."""
    from embedrl_verl.platforms.footprint import shape_of

    length, count, layers = (512, 32, 28) if device == "cuda" else (16, 4, 2)
    model = decoder(EMBEDDER, layers, device).eval()
    rows = packed(model.config.hidden_size, length, count, device, training=False)
    with torch.no_grad():
        seconds, peak = measure(lambda: model(**rows), device, repeat=5)
    figures.values["embed"] = {
        "rows/s": round(count / seconds, 1),
        "share of peak": share_of_peak(flops_of(model, length, count), seconds),
        "peak GiB over weights": round(peak, 2),
    }
    if device == "cuda":
        shape = shape_of(EMBEDDER)
        figures.keep(
            "embed: estimate / measured", shape.layer_forward(length * count) / (peak * GIB), at_least=0.6, at_most=1.6
        )
    figures.keep("embed: length of the vectors", float(model(**rows).last_hidden_state.float().norm(dim=-1).mean()))


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need("transformers")
    update(device, figures)
    embed(device, figures)
