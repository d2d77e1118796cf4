# SPDX-License-Identifier: Apache-2.0
"""The config section `data.embedrl`: how prompts are written, how large media may be, which pairs share a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FACTS, Family, family_of

SECTION = "data.embedrl"
FAMILY_OF_PROCESSOR: dict[str, Family] = {facts.processor: family for family, facts in FACTS.items()}


@dataclass(frozen=True)
class DataSettings:
    """Values of `data.embedrl`.

    Attributes:
        family: qwen2_vl, qwen2_5_vl, qwen3_vl, or auto: by the Reasoner's processor.
        prompt_style: prompt templates, "paper" or "compact".
        few_shot: keep the worked examples of the templates.
        image_min_tokens ... max_frames: limits of the Reasoner's media, see `MediaLimits`.
        pairs_together: neighbouring pairs of the file that share a batch, see `PairBatchSampler`.

    Raises:
        ConfigError: unknown key, wrong type or impossible limits.
    """

    family: str = "auto"
    prompt_style: str = "paper"
    few_shot: bool = True
    image_min_tokens: int = 128
    image_max_tokens: int = 768
    frame_min_tokens: int = 128
    frame_max_tokens: int = 300
    max_frames: int = 8
    pairs_together: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not type(field.default):
                raise ConfigError(
                    f"{SECTION}.{field.name} must be of type {type(field.default).__name__}; got {value!r}"
                )
        if self.pairs_together < 1:
            raise ConfigError(f"{SECTION}.pairs_together must be at least 1; got {self.pairs_together}")
        self.limits(28)  # raises on impossible limits

    @classmethod
    def from_config(cls, data_config: Mapping[str, Any]) -> DataSettings:
        """Settings of verl's `data` section (a dict or DictConfig); without `embedrl` the defaults."""
        section = dict(data_config.get("embedrl") or {})
        known = [field.name for field in fields(cls)]
        unknown = [key for key in section if key not in known]
        if unknown:
            raise ConfigError(f"unknown key {SECTION}.{unknown[0]}; known are {', '.join(known)}")
        return cls(**section)

    def limits(self, token_side: int) -> MediaLimits:
        """Media limits for a model with visual tokens of `token_side` pixels (28 or 32)."""
        return MediaLimits(
            token_side=token_side,
            image_min_tokens=self.image_min_tokens,
            image_max_tokens=self.image_max_tokens,
            frame_min_tokens=self.frame_min_tokens,
            frame_max_tokens=self.frame_max_tokens,
            max_frames=self.max_frames,
        )


def resolve_family(family: str, processor: object) -> Family:
    """The family named in the settings, or for "auto" the one of the processor's class.

    Raises:
        ConfigError: an unknown family, or "auto" and the processor is none of Qwen-VL's.
    """
    if family != "auto":
        return family_of(family)
    name = type(processor).__name__
    if name not in FAMILY_OF_PROCESSOR:
        raise ConfigError(
            f"{SECTION}.family=auto knows the processors {', '.join(FAMILY_OF_PROCESSOR)}; got {name}. "
            f"Train a Qwen-VL model, or name the family whose prompts and sizes it shares"
        )
    return FAMILY_OF_PROCESSOR[name]
