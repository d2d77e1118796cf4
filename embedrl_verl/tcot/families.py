# SPDX-License-Identifier: Apache-2.0
"""The Reasoner's families and how each one speaks of places in an image.

Qwen2-VL and Qwen3-VL write boxes in 0..1000 relative to width and height; Qwen2.5-VL writes pixels of the image as
resized for the model. One visual token shows 28x28 px (Qwen2-VL, Qwen2.5-VL) or 32x32 px (Qwen3-VL).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from embedrl_verl.errors import ConfigError

Family: TypeAlias = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
BoxConvention: TypeAlias = Literal["relative_1000", "absolute"]

FAMILIES: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BOX_CONVENTIONS: tuple[BoxConvention, ...] = ("relative_1000", "absolute")

# `model_type` of a Hugging Face config, of the whole model or of its language part. A family's name is one of them.
_FAMILY_OF_MODEL_TYPE: Mapping[str, Family] = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_vl_text": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl",
}
_CONVENTION: Mapping[Family, BoxConvention] = {
    "qwen2_vl": "relative_1000",
    "qwen2_5_vl": "absolute",
    "qwen3_vl": "relative_1000",
}
_TOKEN_SIDE: Mapping[Family, Literal[28, 32]] = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}


def family_of(hf_model_type: str) -> Family:
    """Family of a Hugging Face `config.model_type` (a family's own name is one).

    Raises:
        ConfigError: a model type whose box units are not known.
    """
    family = _FAMILY_OF_MODEL_TYPE.get(hf_model_type)
    if family is None:
        raise ConfigError(
            f"model type must be one of {', '.join(_FAMILY_OF_MODEL_TYPE)}; got {hf_model_type!r}. "
            f"Name the family whose box units the model writes: {', '.join(FAMILIES)}"
        )
    return family


def box_convention(family: Family) -> BoxConvention:
    """Units in which the family writes boxes.

    Raises:
        ConfigError: an unknown family.
    """
    return _CONVENTION[family_of(family)]


def token_side(family: Family) -> Literal[28, 32]:
    """Pixels along one side of what a visual token of the family shows.

    Raises:
        ConfigError: an unknown family.
    """
    return _TOKEN_SIDE[family_of(family)]
