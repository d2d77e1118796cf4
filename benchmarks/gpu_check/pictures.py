# SPDX-License-Identifier: Apache-2.0
"""The vision model at full width on a whole micro-batch of pictures, forward and backward: time and memory.

32 layers of Qwen2-VL-7B's, 40 pictures of 768 visual tokens, with gradient checkpointing. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_check.stage import GIB, Figures, measure, need

PATH = "Qwen/Qwen2-VL-7B-Instruct"


def vision_model(device: str) -> Any:
    """Random bfloat16 weights; two narrow layers without CUDA."""
    from transformers import AutoConfig, AutoModel

    from embedrl_verl.platforms import varlen
    from embedrl_verl.platforms.footprint import PUBLISHED

    varlen.register()
    family, values = PUBLISHED[PATH]
    vision = {**values["vision_config"]}
    text = {**values["text_config"], "num_hidden_layers": 1, "vocab_size": 1024, "pad_token_id": 0}
    if device != "cuda":
        vision |= {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2}
        text |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(family, **{**values, "vision_config": vision, "text_config": text})
    with torch.device(device):
        model = AutoModel.from_config(config, attn_implementation=varlen.NAME, dtype=torch.bfloat16)
    return model.visual.train()


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need("transformers")
    from embedrl_verl.platforms.footprint import shape_of

    model = vision_model(device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    count, height, width = (40, 48, 64) if device == "cuda" else (2, 8, 8)
    grid = torch.tensor([[1, height, width]] * count, device=device)
    patches = count * height * width
    pixels = torch.randn(patches, 1176, device=device, dtype=torch.bfloat16)

    def work() -> None:
        model(pixels, grid_thw=grid).pooler_output.sum().backward()

    seconds, peak = measure(work, device, repeat=2)
    figures.values["forward and backward"] = {
        "s": round(seconds, 3),
        "pictures/s": round(count / seconds, 1),
        "peak GiB": round(peak, 2),
    }
    weight = model.blocks[0].attn.qkv.weight.grad
    figures.keep("gradient of the first block", float(weight.float().norm()), at_least=1e-12)
    if device == "cuda":
        shape, visual = shape_of(PATH), patches // 4
        estimated = shape.checkpoints(0, visual) + shape.vision_backward(visual)
        figures.keep("estimate / measured", estimated / (peak * GIB), at_least=0.75, at_most=1.33)
