# SPDX-License-Identifier: Apache-2.0
"""From the configuration section `embedrl.embedder` to the objects of this package."""

from __future__ import annotations

import torch

from embedrl_verl.config.schema import EmbedderConfig, MediaConfig
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.families import token_side

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def processor_for(config: EmbedderConfig, *, max_frames: int | None = None) -> EmbedProcessor:
    """The processor that encodes rows for the Embedder of the section; `max_frames` None: the default of the data."""
    side = token_side(family_of_config(load_config(config.path)))
    frames = MediaConfig().max_frames if max_frames is None else max_frames
    return EmbedProcessor.from_pretrained(
        config.path,
        config.profile,
        MediaLimits.of(config, side, frames),
        max_text_tokens=config.max_text_tokens,
        pixel_dtype=DTYPES[config.dtype],
    )
