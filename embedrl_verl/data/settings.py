# SPDX-License-Identifier: Apache-2.0
"""The config section `data.embedrl`: how prompts are written, how large media may be, which pairs share a batch."""

from __future__ import annotations

from embedrl_verl.config.schema import MediaConfig, section
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FACTS, Family, family_of

FAMILY_OF_PROCESSOR: dict[str, Family] = {facts.processor: family for family, facts in FACTS.items()}


@section("data.embedrl")
class DataSettings(MediaConfig):
    """Values of `data.embedrl`, checked; what each means stands in egrl_trainer.yaml."""

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
            f"data.embedrl.family=auto knows the processors {', '.join(FAMILY_OF_PROCESSOR)}; got {name}. "
            f"Train a Qwen-VL model, or name the family whose prompts and sizes it shares"
        )
    return FAMILY_OF_PROCESSOR[name]
