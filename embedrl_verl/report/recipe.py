# SPDX-License-Identifier: Apache-2.0
"""The limits of an EG-RL recipe that data is held against: how long prompts and T-CoTs may be, how large media."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot.evidence import MAX_ASPECT, MAX_EVIDENCE, MIN_SIDE

MEDIA_OPTIONS = ("image_min_tokens", "image_max_tokens", "frame_min_tokens", "frame_max_tokens", "max_frames")


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

    data: DataSettings = DataSettings()  # noqa: RUF009 - immutable
    media_root: str | None = None
    max_prompt_length: int = 14336
    max_response_length: int = 2048
    max_text_tokens: int = 480
    min_side: int = MIN_SIDE
    max_aspect: float = MAX_ASPECT
    max_evidence: int = MAX_EVIDENCE


def recipe_limits(overrides: Sequence[str]) -> RecipeLimits:
    """Limits of a run with these hydra overrides, as a recipe takes them on its command line; [] needs no verl.

    Raises:
        ConfigError: the configuration cannot be composed or has impossible limits.
    """
    if not overrides:
        return RecipeLimits()
    from embedrl_verl.config import load_embedrl_config
    from embedrl_verl.config.compose import compose

    config = compose(["embedrl.embedder.path=none", *overrides])  # a required key that has no say here
    section = load_embedrl_config(config)
    return RecipeLimits(
        data=DataSettings.from_config(config.data),
        media_root=config.data.media_root,
        max_prompt_length=_positive(config.data.max_prompt_length, "data.max_prompt_length"),
        max_response_length=_positive(config.data.max_response_length, "data.max_response_length"),
        max_text_tokens=section.embedder.max_text_tokens,
        min_side=section.evidence.min_side,
        max_aspect=section.evidence.max_aspect,
        max_evidence=section.evidence.max_items,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that `limits_of` reads."""
    group = parser.add_argument_group("recipe", "what the data is held against; the defaults are those of EG-RL")
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="hydra overrides as for a recipe, e.g. data.max_prompt_length=4096 data.embedrl.max_frames=16",
    )
    group.add_argument("--media-root", metavar="DIR", help="folder that media paths are relative to (data.media_root)")
    group.add_argument("--family", help="who wrote the T-CoTs: qwen2_vl, qwen2_5_vl, qwen3_vl, auto (of the tokenizer)")
    group.add_argument("--prompt-style", help="prompt templates: paper or compact (data.embedrl.prompt_style: paper)")
    group.add_argument("--max-prompt-length", type=int, metavar="N", help="data.max_prompt_length (14336)")
    group.add_argument("--max-response-length", type=int, metavar="N", help="data.max_response_length (2048)")
    for name in MEDIA_OPTIONS:
        default = getattr(DataSettings(), name)
        group.add_argument(
            "--" + name.replace("_", "-"), type=int, metavar="N", help=f"data.embedrl.{name} ({default})"
        )


def limits_of(args: argparse.Namespace) -> RecipeLimits:
    """Limits of the parsed options; a named option wins over `--set`.

    Raises:
        ConfigError: as `recipe_limits`, or a limit below 1.
    """
    limits = recipe_limits(args.set)
    named = {
        name: getattr(args, name)
        for name in ("family", "prompt_style", *MEDIA_OPTIONS)
        if getattr(args, name) is not None
    }
    found = {field.name for field in fields(RecipeLimits)} & {"media_root", "max_prompt_length", "max_response_length"}
    values = {name: getattr(args, name) for name in found if getattr(args, name) is not None}
    for name, value in values.items():
        if isinstance(value, int):
            _positive(value, "--" + name.replace("_", "-"))
    return replace(limits, data=replace(limits.data, **named), **values)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1; got {value}")
    return int(value)
