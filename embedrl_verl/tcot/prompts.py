# SPDX-License-Identifier: Apache-2.0
"""The prompt that asks a Reasoner for a T-CoT: media first, then the text of a style's template.

With `gold_answer` the same prompt annotates (stage 1): the answer is told, and to be reasoned towards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import Family, box_convention
from embedrl_verl.kinds import INPUT_KINDS, InputKind
from embedrl_verl.tcot.styles import load_style


class PromptItem(Protocol):
    """What a prompt is about: `embedrl_verl.data.media.LoadedItem`."""

    @property
    def text(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def images(self) -> Sequence[Any]: ...
    @property
    def frames(self) -> Sequence[Any]: ...
    @property
    def frame_times(self) -> Any: ...


_CONTROL = re.compile(r"<(\|\w+\|)>")


def build_prompt(
    kind: InputKind,
    item: PromptItem,
    *,
    family: Family,
    gold_answer: str | None = None,
    few_shot: bool = True,
    style: str = "paper",
) -> list[dict[str, Any]]:
    """One user turn that asks for the T-CoT of an item.

    Args:
        kind: picks the task and the evidence key.
        item: decoded media and text. Control tokens of the chat format in its texts (such as <|image_pad|>) are broken
            up, so that data can neither forge a turn nor add media.
        family: the Reasoner's family, which decides the units of boxes.
        gold_answer: the known answer, for annotation.
        few_shot: put the template's worked examples in.
        style: "paper", for instruct models; "compact", one line for models of a few million parameters.

    Returns:
        [{"role": "user", "content": parts}], parts {"type": "video", "video": [images], "times": FrameTimes}, then
        {"type": "image", "image": image} for each image, then one {"type": "text", "text": str}.

    Raises:
        ConfigError: an unknown kind, family or style, or an empty `gold_answer`.
        DataError: the item lacks what its kind is about (text, image or frames).
    """
    if kind not in INPUT_KINDS:
        raise ConfigError(f"kind must be one of {', '.join(INPUT_KINDS)}; got {kind!r}")
    if gold_answer is not None and not gold_answer.strip():
        raise ConfigError("gold_answer must not be empty; leave it out (None) where the answer is not known")
    if kind in ("query_video", "target_video"):
        medium, is_there = "frames", bool(item.frames)
    elif kind in ("query_image", "query_page", "target_image", "target_page"):
        medium, is_there = "an image", bool(item.images)
    else:
        medium, is_there = "text", bool(item.text.strip())
    if not is_there:
        raise DataError(f"an item of kind {kind} must have {medium}; it has none")

    text = load_style(style).render(
        kind,
        box_convention(family),
        instruction=_harmless(item.instruction),
        text=_harmless(item.text),
        gold_answer=_harmless(gold_answer) if gold_answer else None,
        num_images=len(item.images),
        num_frames=len(item.frames),
        few_shot=few_shot,
    )
    parts: list[dict[str, Any]] = []
    if item.frames:
        parts.append({"type": "video", "video": list(item.frames), "times": item.frame_times})
    parts += [{"type": "image", "image": image} for image in item.images]
    parts.append({"type": "text", "text": text})
    return [{"role": "user", "content": parts}]


def _harmless(text: str) -> str:
    return _CONTROL.sub(r"< \1 >", text.strip())
