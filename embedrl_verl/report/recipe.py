# SPDX-License-Identifier: Apache-2.0
"""The limits of an EG-RL recipe that data is held against: how long prompts and T-CoTs may be, how large media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot.evidence import MAX_ASPECT, MAX_EVIDENCE, MIN_SIDE


@dataclass(frozen=True)
class RecipeLimits:
    """Defaults are those of the configuration `egrl_trainer`.

    Attributes:
        data: section `data.embedrl`.
        media_root: `data.media_root`.
        max_prompt_length: `data.max_prompt_length`, tokens of a prompt with its media.
        max_response_length: `data.max_response_length`, tokens of a T-CoT with its end token.
        max_text_tokens: `embedrl.embedder.max_text_tokens`, tokens of a side's own text that the Embedder reads.
        min_side, max_aspect, max_evidence: section `embedrl.evidence`.
    """

    data: MediaConfig = MediaConfig()  # noqa: RUF009 - immutable
    media_root: str | None = None
    max_prompt_length: int = 14336
    max_response_length: int = 2048
    max_text_tokens: int = 480
    min_side: int = MIN_SIDE
    max_aspect: float = MAX_ASPECT
    max_evidence: int = MAX_EVIDENCE


def recipe_limits(overrides: Sequence[str], named: Mapping[str, Any] | None = None) -> RecipeLimits:
    """Limits of a run with these hydra overrides, as a recipe takes them on its command line; [] needs no verl.

    Args:
        named: values of fields of `RecipeLimits` and of `data.embedrl`, which win over the overrides.
    """
    limits = _composed(overrides) if overrides else RecipeLimits()
    own = {field.name for field in fields(RecipeLimits)}
    data = {name: value for name, value in (named or {}).items() if name not in own}
    values = {name: value for name, value in (named or {}).items() if name in own}
    for name in ("max_prompt_length", "max_response_length"):
        if name in values:
            _positive(values[name], "--" + name.replace("_", "-"))
    return replace(limits, data=replace(limits.data, **data), **values)


def _composed(overrides: Sequence[str]) -> RecipeLimits:
    from embedrl_verl.config import load_embedrl_config
    from embedrl_verl.config.compose import compose

    config = compose(["embedrl.embedder.path=none", *overrides])  # a required key that has no say here
    section = load_embedrl_config(config)
    return RecipeLimits(
        data=MediaConfig.from_config(config.data),
        media_root=config.data.media_root,
        max_prompt_length=_positive(config.data.max_prompt_length, "data.max_prompt_length"),
        max_response_length=_positive(config.data.max_response_length, "data.max_response_length"),
        max_text_tokens=section.embedder.max_text_tokens,
        min_side=section.evidence.min_side,
        max_aspect=section.evidence.max_aspect,
        max_evidence=section.evidence.max_items,
    )


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1; got {value}")
    return int(value)
