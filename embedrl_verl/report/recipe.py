# SPDX-License-Identifier: Apache-2.0
"""The limits of an EG-RL recipe that data is held against: how long prompts and T-CoTs may be, how large media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig


@dataclass(frozen=True)
class RecipeLimits:
    """Sections `data.embedrl` and `embedrl.evidence`, three keys of `data`, and `embedrl.embedder.max_text_tokens`.
    Defaults are those of the configuration `egrl_trainer`."""

    data: MediaConfig = MediaConfig()  # noqa: RUF009 - immutable
    evidence: EvidenceConfig = EvidenceConfig()  # noqa: RUF009
    media_root: str | None = None
    max_prompt_length: int = 14336
    max_response_length: int = 2048
    max_text_tokens: int = 480


def recipe_limits(overrides: Sequence[str], named: Mapping[str, Any]) -> RecipeLimits:
    """Limits of a run with these hydra overrides, as a recipe takes them on its command line; [] needs no verl.
    `named` values, of fields of `RecipeLimits` and of `data.embedrl`, win over them."""
    limits = _composed(overrides) if overrides else RecipeLimits()
    own = {field.name for field in fields(RecipeLimits)} & set(named)
    data = replace(limits.data, **{name: named[name] for name in named if name not in own})
    return replace(limits, data=data, **{name: named[name] for name in own})


def _composed(overrides: Sequence[str]) -> RecipeLimits:
    from embedrl_verl.config import load_embedrl_config
    from embedrl_verl.config.compose import compose

    config = compose(["embedrl.embedder.path=none", *overrides])  # a required key that has no say here
    section = load_embedrl_config(config)
    return RecipeLimits(
        data=MediaConfig.from_config(config.data),
        evidence=section.evidence,
        media_root=config.data.media_root,
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=config.data.max_response_length,
        max_text_tokens=section.embedder.max_text_tokens,
    )
