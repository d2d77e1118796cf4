# SPDX-License-Identifier: Apache-2.0
"""What the programs of this folder share: how the tiny models are asked and what they see (recipes/run_egrl_tiny_cpu.sh
says the same), and how a program is run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import typer

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.errors import EmbedRLError
from embedrl_verl.families import Family, token_side
from embedrl_verl.model.reasoner import Reasoner

MEDIA = MediaConfig(
    prompt_style="compact",
    few_shot=False,
    image_min_tokens=4,
    image_max_tokens=64,
    frame_min_tokens=4,
    frame_max_tokens=16,
)
"""A cell of the digits world is one visual token. Reasoner and Embedder have the same limits."""
MAX_NEW_TOKENS = 96
"""Longest T-CoT (data.max_response_length)."""

TcotParts: TypeAlias = Literal["full", "no_evidence", "answer_only"]
"""What of a T-CoT there is: all of it; its text, but nothing that is cut out; no thinking and no check."""


def evidence_of(parts: TcotParts) -> EvidenceConfig:
    """What may be cut from the media."""
    return EvidenceConfig() if parts == "full" else EvidenceConfig(max_items=0)


def tiny_limits(family: Family) -> MediaLimits:
    """The limits of `MEDIA` for a family."""
    return MediaLimits.of(MEDIA, token_side(family), MEDIA.max_frames)


def tiny_reasoner(path: str | Path) -> Reasoner:
    """A tiny Reasoner in float32 on the CPU."""
    return Reasoner(path, MEDIA, max_new_tokens=MAX_NEW_TOKENS, batch_size=96)


def run_program(main: Callable[..., None]) -> None:
    """Run `main` by the words of the command line; a refusal becomes one line and its exit code."""
    try:
        typer.run(main)
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
