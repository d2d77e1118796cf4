# SPDX-License-Identifier: Apache-2.0
"""The Embedder's forward pass: the state after the final norm at the last token of each row, at length 1.

One code path for the three Qwen-VL families, for the in-process Embedder and for verl's engines:

1. all images and videos of the batch go through the vision model in *one* call (platforms.vision);
2. rows are packed one after another, without padding; positions that start again at 0 tell the attention where;
3. the inner model's `last_hidden_state` is read. (`hidden_states[-1]` of the generation classes is the state before the
   norm since transformers 4.56.)

A vector that is not finite, or has no direction, comes out as NaN: a failed row, never a zero vector.
"""

from __future__ import annotations

from typing import Any

import torch

from embedrl_verl.embedder.batching import PackedRows
from embedrl_verl.platforms.vision import embed_with_media


def embed_packed(inner: Any, rows: PackedRows, *, always_run_vision: bool = False) -> torch.Tensor:
    """Embeddings of packed rows.

    Args:
        inner: `.model` of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL generation class.
        rows: on the model's device.
        always_run_vision: run the vision model also on a batch without media (FSDP with several ranks); its result does
            not enter the embeddings.

    Returns:
        float32 (B, D), each row of length 1 or NaN; differentiable when gradients are enabled.

    Raises:
        MediaError: placeholders and media do not belong together.
    """
    embeds, deepstack = embed_with_media(inner, rows.input_ids, rows.media, always_run_vision=always_run_vision)
    hidden = inner.language_model(
        input_ids=None,
        inputs_embeds=embeds,
        position_ids=rows.position_ids,
        attention_mask=None,
        use_cache=False,
        **deepstack,
    ).last_hidden_state
    pooled = hidden[0, rows.last].float()
    vectors: torch.Tensor = pooled / pooled.norm(dim=-1, keepdim=True)
    return vectors
