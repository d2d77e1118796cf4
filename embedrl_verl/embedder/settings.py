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


def limits_for(config: EmbedderConfig, *, max_frames: int) -> MediaLimits:
    """The media limits of the section; `max_frames` is the data set's, which decides how many frames there are."""
    return MediaLimits(
        token_side=token_side(family_of_config(load_config(config.path))),
        image_min_tokens=config.image_min_tokens,
        image_max_tokens=config.image_max_tokens,
        frame_min_tokens=config.frame_min_tokens,
        frame_max_tokens=config.frame_max_tokens,
        max_frames=max_frames,
    )


def processor_for(config: EmbedderConfig, *, max_frames: int | None = None) -> EmbedProcessor:
    """The processor that encodes rows for the Embedder of the section; `max_frames` None: the default of the data."""
    return EmbedProcessor.from_pretrained(
        config.path,
        config.profile,
        limits_for(config, max_frames=MediaConfig().max_frames if max_frames is None else max_frames),
        max_text_tokens=config.max_text_tokens,
        pixel_dtype=DTYPES[config.dtype],
    )
