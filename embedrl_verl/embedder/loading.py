# SPDX-License-Identifier: Apache-2.0
"""Loads an Embedder's weights, completely or not at all.

The *generation* class is loaded and its inner model used. Loading such a checkpoint through `AutoModel` (transformers
5.9, Qwen2-VL) leaves the whole language part newly initialised with no more than a table of warnings; here any weight
that the forward pass needs and the checkpoint lacks is an error. The output matrix is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from embedrl_verl.embedder.profiles import EmbedderProfile, load_tokenizer, token_id
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.families import Family, family_of
from embedrl_verl.platforms import varlen

NOT_NEEDED = frozenset({"lm_head.weight"})


def load_config(path: str | Path, **overrides: Any) -> PretrainedConfig:
    """The model configuration of a checkpoint.

    Raises:
        EmbedderError: there is none, or it is not of a supported family.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **overrides)
    except (OSError, ValueError) as error:
        raise EmbedderError(f"{path}: the Embedder's configuration cannot be loaded: {error}") from error
    family_of_config(config)
    return config


def family_of_config(config: PretrainedConfig) -> Family:
    """The model family. Raises EmbedderError for one that the Embedder does not support."""
    try:
        return family_of(config.model_type)
    except ConfigError as error:
        raise EmbedderError(f"{config.name_or_path}: {error}") from error


def check_profile(path: str | Path, config: PretrainedConfig, profile: EmbedderProfile) -> None:
    """Refuse a checkpoint that cannot be read out as the profile says.

    Raises:
        EmbedderError: the profile is for other families, its token is unknown to the tokenizer, or the token's id lies
            outside the model's embedding matrix.
    """
    family = family_of_config(config)
    if profile.families and family not in profile.families:
        raise EmbedderError(
            f"{path}: profile {profile.name} is for {', '.join(profile.families)}; this checkpoint is {family}"
        )
    if profile.emb_token is None:
        return
    tokenizer = load_tokenizer(path)
    number = token_id(tokenizer, profile.emb_token)
    if number is None:
        raise EmbedderError(
            f"{path}: profile {profile.name} reads the embedding at the token {profile.emb_token}, which the tokenizer "
            f"does not have. Add it (embedrl add-emb {path} --out FOLDER) and train with it, or choose another profile"
        )
    rows = config.get_text_config().vocab_size
    if number >= rows:
        raise EmbedderError(
            f"{path}: the token {profile.emb_token} has id {number}, but the embedding matrix has {rows} rows; "
            "resize the model's token embeddings to the tokenizer and save again"
        )


def load_generation_model(
    path: str | Path,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = varlen.NAME,
) -> PreTrainedModel:
    """The whole model of a checkpoint on the CPU; `.model` is the part that embeds.

    Raises:
        EmbedderError: weights are missing or have other shapes than the configuration says; the message names them.
    """
    config = load_config(path) if config is None else config
    if attn_implementation == varlen.NAME:
        varlen.register()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EmbedderError(f"{path}: the Embedder's weights cannot be loaded: {error}") from error
    missing = sorted(set(report["missing_keys"]) - NOT_NEEDED)
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    if missing or wrong:
        raise EmbedderError(
            f"{path}: {len(missing)} weights are missing and {len(wrong)} have other shapes than config.json says, "
            f"first {', '.join((missing + wrong)[:5])}. They would be random numbers; save the checkpoint again with "
            "its generation class"
        )
    return model
