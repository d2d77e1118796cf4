# SPDX-License-Identifier: Apache-2.0
"""The Embedder's forward pass: the state after the final norm at the last token of each row, at length 1.

One code path for the three Qwen-VL families, for the in-process Embedder and for verl's engines:

1. all images and videos of the batch go through the vision model in *one* call. Under FSDP every rank must run the same
   collectives, and a call per kind of medium would depend on what a rank happens to hold;
2. their features take the place of the placeholders (Qwen3-VL: also of its deep-stack layers);
3. rows are padded on the right and attention is causal, so no mask is needed and the fused kernels apply;
4. the inner model's `last_hidden_state` is read. (`hidden_states[-1]` of the generation classes is the state before the
   norm since transformers 4.56.)

A vector that is not finite, or has no direction, comes out as NaN: a failed row, never a zero vector.
"""

from __future__ import annotations

from typing import Any

import torch

from embedrl_verl.embedder.batching import PaddedRows
from embedrl_verl.errors import EmbedderError
from embedrl_verl.tcot import family_of


def embed_padded(inner: Any, rows: PaddedRows, *, always_run_vision: bool = False) -> torch.Tensor:
    """Embeddings of a padded batch.

    Args:
        inner: `.model` of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL generation class.
        rows: on the model's device.
        always_run_vision: run the vision model also on a batch without media (FSDP with several ranks); its result does
            not enter the embeddings.

    Returns:
        float32 (B, D), each row of length 1 or NaN; differentiable when gradients are enabled.

    Raises:
        EmbedderError: placeholders and media do not belong together.
    """
    embeds = inner.get_input_embeddings()(rows.input_ids)
    deepstack: dict[str, Any] = {}
    media = _join_media(rows)
    if media is None and always_run_vision:
        embeds = embeds + 0.0 * sum(part.sum() for part in _vision(inner, *_blank_media(inner, embeds.device)))
    if media is not None:
        features, *deep_features = _vision(inner, *media)
        is_image = rows.input_ids == inner.config.image_token_id
        is_visual = is_image | (rows.input_ids == inner.config.video_token_id)
        # Features are ordered images, then videos; placeholders are ordered as they are read.
        order = torch.argsort((~is_image[is_visual]).int(), stable=True).argsort()
        if len(order) != len(features):
            raise EmbedderError(f"{len(features)} visual tokens need as many placeholders; the rows have {len(order)}")
        embeds = embeds.masked_scatter(is_visual.unsqueeze(-1), features[order].to(embeds.dtype))
        if deep_features:
            layers = [layer[order].to(embeds.dtype) for layer in deep_features]
            deepstack = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": layers}
    hidden = inner.language_model(
        input_ids=None,
        inputs_embeds=embeds,
        position_ids=rows.position_ids,
        attention_mask=None,
        use_cache=False,
        **deepstack,
    ).last_hidden_state
    pooled = hidden[torch.arange(len(hidden), device=hidden.device), rows.last].float()
    vectors: torch.Tensor = pooled / pooled.norm(dim=-1, keepdim=True)
    return vectors


def _vision(inner: Any, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
    """Features of all merged tokens (T, D), for Qwen3-VL followed by those of its deep-stack layers."""
    output = inner.visual(pixels, grid_thw=grid)
    deep = output.deepstack_features if family_of(inner.config.model_type) == "qwen3_vl" else []
    return [output.pooler_output, *deep]


def _join_media(rows: PaddedRows) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Patches (P, C) and grids (M, 3) of all images, then of all videos; None without media."""
    pairs = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    held = [(rows.media[pixels], rows.media[grid]) for pixels, grid in pairs if grid in rows.media]
    if not held:
        return None
    return torch.cat([pixels for pixels, _ in held]), torch.cat([grid for _, grid in held])


def _blank_media(inner: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest image: one merged token of zeros."""
    vision = inner.config.vision_config
    merge = vision.spatial_merge_size
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(merge**2, channels, device=device), torch.tensor([[1, merge, merge]], device=device)
