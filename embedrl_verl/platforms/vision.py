# SPDX-License-Identifier: Apache-2.0
"""Embeddings of tokens and media for the Qwen-VL families, with one run of the vision model whatever the media are.

Under FSDP every rank must run the same collectives, and each run of the vision model gathers its weights: one run for
images and one for videos would depend on what a rank happens to hold. Plain torch; verl's actor (platforms.patches) and
the Embedder (embedder.model) both use it.
"""

from __future__ import annotations

from typing import Any

import torch

from embedrl_verl.errors import MediaError

PAIRS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""Patches (P, C) and grids (M, 3) of images, and of videos."""


def embed_with_media(
    inner: Any, input_ids: torch.Tensor, media: dict[str, torch.Tensor], *, always_run_vision: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token embeddings with the features of the media in place of their placeholders.

    Args:
        inner: `.model` of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL generation class.
        input_ids: int64 (B, L).
        media: some of the keys of `PAIRS`; images and videos each in the order of their placeholders.
        always_run_vision: run the vision model on a blank image where there are no media; the result is times 0.

    Returns:
        (B, L, D), and the arguments that the language model of Qwen3-VL takes beside (deep-stack features), else {}.
    """
    embeds = inner.get_input_embeddings()(input_ids)
    held = [(media[pixels], media[grid]) for pixels, grid in PAIRS if media.get(grid) is not None]
    if not held:
        if always_run_vision:
            embeds = embeds + 0.0 * sum(part.sum() for part in _features(inner, *_blank(inner, embeds.device)))
        return embeds, {}
    features, *deep = _features(inner, torch.cat([one for one, _ in held]), torch.cat([grid for _, grid in held]))
    is_image = input_ids == inner.config.image_token_id
    is_visual = is_image | (input_ids == inner.config.video_token_id)
    # Features are ordered images, then videos; placeholders are ordered as they are read.
    order = torch.argsort((~is_image[is_visual]).int(), stable=True).argsort()
    if len(order) != len(features):
        raise MediaError(f"{len(features)} visual tokens need as many placeholders; the rows have {len(order)}")
    embeds = embeds.masked_scatter(is_visual.unsqueeze(-1), features[order].to(embeds.dtype))
    if not deep:
        return embeds, {}
    layers = [layer[order].to(embeds.dtype) for layer in deep]
    return embeds, {"visual_pos_masks": is_visual, "deepstack_visual_embeds": layers}


def _features(inner: Any, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
    """Features of all merged tokens (T, D), then those of the deep-stack layers, if the family has such."""
    output = inner.visual(pixels.type(inner.visual.dtype), grid_thw=grid)
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def _blank(inner: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest image: one merged token of zeros."""
    vision = inner.config.vision_config
    merge = vision.spatial_merge_size
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(merge**2, channels, device=device), torch.tensor([[1, merge, merge]], device=device)
