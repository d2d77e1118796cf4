# SPDX-License-Identifier: Apache-2.0
"""Packed rows of a tiny model of each family against the same rows one by one: logits and gradients.

Rows of text only, of one and two pictures, and of a clip, in one sequence. Needs transformers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_check.stage import Figures, error, need

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def rows_of(folder: Path, device: str) -> list[dict[str, Any]]:
    """Rows as the model's processor makes them."""
    import numpy as np
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    random = np.random.default_rng(0)

    def pixels(*shape: int) -> Any:
        return random.integers(0, 256, (*shape, 3), dtype=np.uint8)

    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    rows = [
        processor(text=["seven and three words more"], return_tensors="pt"),
        processor(text=[f"{image} one"], images=[pixels(112, 112)], return_tensors="pt"),
        processor(text=[f"{image} two {image}"], images=[pixels(112, 56), pixels(56, 168)], return_tensors="pt"),
        processor(text=[f"{video} a clip"], videos=[pixels(4, 112, 112)], return_tensors="pt", do_sample_frames=False),
        processor(text=["two"], return_tensors="pt"),
    ]
    return [dict(row.to(device)) for row in rows]


def positions_of(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """int (4, 1, T): place in the row, then the three axes."""
    keys = (
        "input_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
        "mm_token_type_ids",
    )
    ids = row["input_ids"]
    given = {"mm_token_type_ids": torch.zeros_like(ids), **{key: row[key] for key in keys if key in row}}
    axes, _ = model.model.get_rope_index(**given)
    place = torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1)
    return torch.cat([place, axes.to(ids.device)])


def forward(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Logits (T, V) of rows in one sequence."""
    media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    given = {key: torch.cat([row[key] for row in rows if key in row]) for key in media if any(key in r for r in rows)}
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    return model(
        input_ids=ids,
        position_ids=torch.cat([positions_of(model, row) for row in rows], dim=2),
        mm_token_type_ids=torch.zeros_like(ids),
        use_cache=False,
        **given,
    ).logits[0]


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need("numpy", "PIL", "transformers")
    from transformers import AutoModelForImageTextToText

    from embedrl_verl.platforms import varlen
    from recipes.tiny_digits.models import build_tiny_model

    varlen.register()
    dtype, limit = (torch.bfloat16, 5e-2) if device == "cuda" else (torch.float32, 1e-4)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_model(folder, family=family)
            rows = rows_of(Path(folder), device)
            models = {
                name: AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=name)
                .to(device)
                .train()
                for name in (varlen.NAME, "sdpa")
            }
        packed = forward(models[varlen.NAME], rows)
        single = torch.cat([forward(models["sdpa"], [row]) for row in rows])
        figures.keep(f"{family}: logits", error(packed, single), at_most=limit)
        weights = torch.linspace(-1, 1, packed.numel(), device=device).view_as(packed)
        for logits in (packed, single):
            (logits.float() * weights).sum().backward()
        own = dict(models["sdpa"].named_parameters())
        largest = max(float(one.grad.abs().max()) for one in own.values() if one.grad is not None)
        worst = 0.0
        for name, one in models[varlen.NAME].named_parameters():
            if (one.grad is None) != (own[name].grad is None):
                figures.failed.append(f"{family}: only one of both has a gradient of {name}")
            elif one.grad is not None:
                worst = max(worst, float((one.grad.float() - own[name].grad.float()).abs().max()) / largest)
        figures.keep(f"{family}: gradients", worst, at_most=limit)
