# SPDX-License-Identifier: Apache-2.0
"""Stamps of results: what was ranked and how, by name. Results are compared if all of it is equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embedrl_verl.embedder.profiles import resolve_profile
from embedrl_verl.errors import ConfigError
from embedrl_verl.model.loading import Settings

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ModelFacts:
    """What a score file says of how the Embedder was asked.

    Attributes:
        instruction_place: the turn that holds the instruction.
        hidden_state: that is pooled.
        pixel_budget: of images and frames.
    """

    instruction_place: str = UNKNOWN
    hidden_state: str = UNKNOWN
    pixel_budget: str = UNKNOWN


def model_facts(settings: Settings) -> ModelFacts:
    """How the Embedder of these settings is asked and read, for the stamps."""
    config = settings.embedrl.embedder
    if config.backend == "sentence_transformers":
        return ModelFacts("as the model has it", "as the model has it", "as the model has it")
    profile = resolve_profile(config.path, config.profile)
    image, frame = (
        f"{low} to {high} tokens"
        for low, high in (
            (config.image_min_tokens, config.image_max_tokens),
            (config.frame_min_tokens, config.frame_max_tokens),
        )
    )
    place = "system turn" if profile.instruction_in_system else "user turn"
    return ModelFacts(place, "after the last norm", f"image {image}, frame {frame}")


def refuse_other_stamp(one: Mapping[str, str], other: Mapping[str, str], where: str) -> None:
    """ConfigError that names the first stamp that differs, or that one of two results lacks.

    Args:
        where: what the two are, for the message.
    """
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            raise ConfigError(
                f"{where} must have equal stamps to be compared; {name} is {one.get(name)!r} and {other.get(name)!r}"
            )
