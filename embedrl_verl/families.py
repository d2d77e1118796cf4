# SPDX-License-Identifier: Apache-2.0
"""The model families: one record each, and nobody else asks for a family by its name.

A new family is a record here, its released sizes in `platforms/footprint.py` if the plan is to know them, and a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from embedrl_verl.errors import ConfigError

Family: TypeAlias = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
BoxConvention: TypeAlias = Literal["relative_1000", "absolute"]
ClipTime: TypeAlias = Literal["patches", "seconds", "stamps"]

FAMILIES: tuple[Family, ...] = get_args(Family)
DEFAULT_FAMILY = FAMILIES[0]
"""Whose prompts, sizes and boxes the data commands and pages take where nothing says."""
BOX_CONVENTIONS: tuple[BoxConvention, ...] = get_args(BoxConvention)


@dataclass(frozen=True)
class BoxUnits:
    """How a family writes boxes.

    Attributes:
        side: what width and height of every image count to; None: pixels of the image as resized for the model.
        prompt: the words that ask for them; `compact`: the same in one.
        words: the same for a person who reads a report.
        digits: behind the decimal point.
    """

    side: int | None
    prompt: str
    compact: str
    words: str
    digits: int = 0

    def of(self, seen: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image that the Reasoner saw as (width, height) pixels, in these units."""
        return seen if self.side is None else (self.side, self.side)


_RELATIVE = "relative to the width (x) and the height (y) of the image"
BOX_UNITS: Mapping[BoxConvention, BoxUnits] = {
    "relative_1000": BoxUnits(
        1000, f"whole numbers from 0 to 1000, {_RELATIVE}", "relative", "0 to 1000 of width and height"
    ),
    "absolute": BoxUnits(
        None,
        "whole numbers in pixels of the image as you see it",
        "pixels",
        "pixels of the image as the Reasoner saw it",
    ),
}


@dataclass(frozen=True)
class FamilyFacts:
    """What the package knows of a family.

    Attributes:
        model_types: `model_type` of a Hugging Face config, of the whole model or of its language part; the family's
            own name is one.
        processor: class of the Hugging Face processor.
        boxes: how it writes boxes: 0..1000 relative to width and height, or pixels of the image as resized for the
            model.
        token_side: pixels along one side of what a visual token shows.
        clip_time: how a clip's time reaches the model: M-RoPE counts its temporal patches; M-RoPE counts its seconds
            (which vLLM has to be told in the processor's arguments); or time stamps stand in the prompt, a temporal
            patch behind each.
        limits_whole_clip: the processor's largest size of a video is that of all frames together, not of one.
        megatron: model types that Megatron-Bridge, the weight converter of verl 0.9.1's Megatron engine, can load.
    """

    model_types: tuple[str, ...]
    processor: str
    boxes: BoxConvention
    token_side: Literal[28, 32]
    clip_time: ClipTime
    limits_whole_clip: bool = False
    megatron: tuple[str, ...] = ()


FACTS: Mapping[Family, FamilyFacts] = {
    "qwen2_vl": FamilyFacts(
        model_types=("qwen2_vl", "qwen2_vl_text"),
        processor="Qwen2VLProcessor",
        boxes="relative_1000",
        token_side=28,
        clip_time="patches",
    ),
    "qwen2_5_vl": FamilyFacts(
        model_types=("qwen2_5_vl", "qwen2_5_vl_text"),
        processor="Qwen2_5_VLProcessor",
        boxes="absolute",
        token_side=28,
        clip_time="seconds",
        megatron=("qwen2_5_vl",),
    ),
    "qwen3_vl": FamilyFacts(
        model_types=("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
        processor="Qwen3VLProcessor",
        boxes="relative_1000",
        token_side=32,
        clip_time="stamps",
        limits_whole_clip=True,
        megatron=("qwen3_vl", "qwen3_vl_moe"),
    ),
}
FAMILY_OF_MODEL_TYPE = {kind: family for family, facts in FACTS.items() for kind in facts.model_types}
_FAMILY_OF_PROCESSOR: dict[str, Family] = {facts.processor: family for family, facts in FACTS.items()}


def family_of(hf_model_type: str) -> Family:
    """Family of a Hugging Face `config.model_type` (a family's own name is one)."""
    family = FAMILY_OF_MODEL_TYPE.get(hf_model_type)
    if family is None:
        raise ConfigError(
            f"model type must be one of {', '.join(FAMILY_OF_MODEL_TYPE)}; got {hf_model_type!r}. "
            f"Name the family whose box units the model writes: {', '.join(FAMILIES)}"
        )
    return family


def resolve_family(family: str, processor: object) -> Family:
    """The family named in the settings, or for "auto" the one of the processor's class."""
    if family != "auto":
        return family_of(family)
    name = type(processor).__name__
    if name not in _FAMILY_OF_PROCESSOR:
        raise ConfigError(
            f"data.embedrl.family=auto knows the processors {', '.join(_FAMILY_OF_PROCESSOR)}; got {name}. "
            f"Train a Qwen-VL model, or name the family whose prompts and sizes it shares"
        )
    return _FAMILY_OF_PROCESSOR[name]


def facts_of(family: str) -> FamilyFacts:
    """The record of a family. Raises ConfigError for an unknown one."""
    return FACTS[family_of(family)]


def box_convention(family: str) -> BoxConvention:
    """Units in which the family writes boxes. Raises ConfigError for an unknown one."""
    return facts_of(family).boxes


def token_side(family: str) -> Literal[28, 32]:
    """Pixels along one side of a visual token of the family. Raises ConfigError for an unknown one."""
    return facts_of(family).token_side
