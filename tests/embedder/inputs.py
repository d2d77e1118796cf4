# SPDX-License-Identifier: Apache-2.0
"""Mixed inputs for the Embedder: text, one image, three images, a video, each with and without T-CoT and evidence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.identity import NO_QUERY, ContentId
from embedrl_verl.data.media import LoadedItem, MediaLimits
from embedrl_verl.data.video import list_times
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.tcot import parse_tcot

LIMITS = {
    family: MediaLimits(side, 1, 64, 1, 64)
    for family, side in zip(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (28, 28, 32), strict=True)
}
LOSS: dict[str, Any] = {"temperature": 0.1, "matryoshka_dims": (16,)}
ROWS = 50
TCOT = (
    '<thinking>Two digits at the left. {"bbox_2d": [[0, 0, 500, 1000]]}</thinking>\n'
    "<rethink>The box holds both.</rethink>\n<answer>4 2</answer>"
)


def section(path: object, family: str = "qwen2_vl", **settings: Any) -> EmbedderConfig:
    """The section `embedrl.embedder` for a tiny checkpoint, in float32 and with the limits of `LIMITS`."""
    limits = {name: value for name, value in dataclasses.asdict(LIMITS[family]).items() if name.endswith("_tokens")}
    return EmbedderConfig(**{"path": str(path), "dtype": "float32", **limits, **settings})


def picture(seed: int, height: int = 56, width: int = 112) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def item(
    text: str = "",
    images: tuple[Image.Image, ...] = (),
    frames: tuple[Image.Image, ...] = (),
    instruction: str = "",
    fps: float = 2.0,
) -> LoadedItem:
    return LoadedItem(text, instruction, images, frames, list_times(fps, len(frames)) if frames else None)


def mixed_inputs(count: int) -> list[EmbedInput]:
    """`count` different inputs; every combination of medium and T-CoT is among the first 12."""
    result = []
    for i in range(count):
        images: tuple[Image.Image, ...] = ()
        frames: tuple[Image.Image, ...] = ()
        if i % 4 == 1:
            images = (picture(i),)
        elif i % 4 == 2:
            images = (picture(i, 56, 56), picture(i + 1000, 90, 30), picture(i + 2000, 28, 112))
        elif i % 4 == 3:
            frames = tuple(picture(i + 1000 * k, 56, 84) for k in range(3 + i % 3))
        tcot = parse_tcot(TCOT.replace("4 2", f"{i} 2")) if i % 3 else None
        evidence = (picture(i + 7, 40, 60),) if i % 3 == 2 else ()
        text = f"number {i} " + "is written here " * (i % 5)
        result.append(EmbedInput(item(text, images, frames, "Find the same digits."), tcot, evidence))
    return result


Pair = tuple[EmbedInput, EmbedInput, tuple[EmbedInput, ...], tuple[ContentId, ...]]
"""Query, target, hard negatives, and contents of the pair and of each negative."""


def contrastive_cases(pairs: int = 6) -> dict[str, list[Pair]]:
    """Batches for a contrastive step: no image, one, three, a video, and all of them with two targets of one content,
    two of one query, hard negatives, T-CoTs and evidence."""

    def text(i: int, k: int) -> EmbedInput:
        return EmbedInput(item(f"number {i} {k} " + "here " * (i % 4), instruction="Find it."))

    def media(i: int, k: int, kind: str) -> EmbedInput:
        seed = 97 * k + i
        images = {"one": (picture(seed),), "three": tuple(picture(seed + 500 * n, 28 + 28 * n, 56) for n in range(3))}
        frames = tuple(picture(seed + 300 * n, 56, 56) for n in range(2 + i % 3)) if kind == "video" else ()
        return EmbedInput(item(f"look {k} " + "at it " * (i % 3), images.get(kind, ()), frames, "Find it."))

    numbers = range(pairs)
    cases: dict[str, list[Pair]] = {"none": [(text(i, 0), text(i, 1), (), (ContentId(i, i),)) for i in numbers]}
    for kind in ("one", "three", "video"):
        cases[kind] = [(media(i, 0, kind), text(i, 1), (), (ContentId(i, i),)) for i in numbers]
    both = mixed_inputs(2 * pairs)
    cases["mixed"] = [
        (
            *(both[2 * i], both[2 * i + 1], (text(i, 5),) * (i % 3)),
            (ContentId((i + 1) // 2, i // 2 * 2), *[ContentId(NO_QUERY, 100 + i)] * (i % 3)),
        )
        for i in numbers
    ]
    return cases
