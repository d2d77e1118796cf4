# SPDX-License-Identifier: Apache-2.0
"""Loads an Embedder's weights, completely or not at all.

The *generation* class is loaded and its inner model used. Loading such a checkpoint through `AutoModel` (transformers
5.9, Qwen2-VL) leaves the whole language part newly initialised with no more than a table of warnings; here any weight
that the forward pass needs and the checkpoint lacks is an error. The output matrix is not needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.families import Family, family_of
from embedrl_verl.platforms import varlen


def load_config(path: str | Path) -> PretrainedConfig:
    """The model configuration of a checkpoint of a supported family."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EmbedderError(f"{path}: the Embedder's configuration cannot be loaded: {error}") from error
    family_of_config(config)
    return config


def family_of_config(config: PretrainedConfig) -> Family:
    """The model family; EmbedderError for one that the Embedder does not support."""
    try:
        return family_of(config.model_type)
    except ConfigError as error:
        raise EmbedderError(f"{config.name_or_path}: {error}") from error


def load_generation_model(
    path: str | Path,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = varlen.NAME,
) -> PreTrainedModel:
    """The whole model of a checkpoint on the CPU; `.model` is the part that embeds."""
    if attn_implementation == varlen.NAME:
        varlen.register()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path,
            config=load_config(path) if config is None else config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EmbedderError(f"{path}: the Embedder's weights cannot be loaded: {error}") from error
    missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    if missing or wrong:
        raise EmbedderError(
            f"{path}: {len(missing)} weights are missing and {len(wrong)} have other shapes than config.json says, "
            f"first {', '.join((missing + wrong)[:5])}. They would be random numbers; save the checkpoint again with "
            "its generation class"
        )
    return model
