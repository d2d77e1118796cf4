# SPDX-License-Identifier: Apache-2.0
"""A tiny Embedder and Reasoner in one folder, untrained, as a run leaves them."""

from pathlib import Path

from embedrl_verl.export.record import TrainingRecord, write_record
from recipes.tiny_digits.models import build_tiny_model

LIMITS = [
    *(f"embedrl.embedder.{kind}_min_tokens=4" for kind in ("image", "frame")),
    *(f"embedrl.embedder.{kind}_max_tokens=64" for kind in ("image", "frame")),
]
"""The overrides that the Embedder needs."""


def make_pair(folder: Path, *, longest: int = 12) -> Path:
    """Write `embedder` and `reasoner` to the folder; `longest`: tokens of a T-CoT."""
    build_tiny_model(folder / "embedder", seed=1)
    build_tiny_model(folder / "reasoner")
    settings = {
        "prompt_style": "compact",
        "image_min_tokens": 4,
        "image_max_tokens": 64,
        "max_response_length": longest,
    }
    write_record(folder / "reasoner", TrainingRecord(stage="egrl", settings=settings))
    return folder
