# SPDX-License-Identifier: Apache-2.0
"""The prompt that asks a Reasoner for a T-CoT: media first, then the text of a style's template.

A style is a template in `templates/`: "paper", for instruct models, with worked examples; "compact", one line for
models of a few million parameters. With `gold_answer` the same prompt annotates (stage 1): the answer is told, and to
be reasoned towards.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import BOX_UNITS, Family, box_convention
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, INPUT_KINDS, InputKind
from embedrl_verl.tcot.evidence import KINDS
from embedrl_verl.tcot.evidence.boxes import example_box
from embedrl_verl.tcot.harmless import break_tokens

STYLES = ("paper", "compact")
_FOLDER = Path(__file__).parent / "templates"
# Prompts are plain text: nothing is escaped. Values are put in as they are and never read as templates.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def build_prompt(kind: InputKind, item: Any, **options: Any) -> list[dict[str, Any]]:
    """One user turn that asks for the T-CoT of a `LoadedItem`; options as `user_turn`.

    Returns:
        [{"role": "user", "content": parts}], parts {"type": "video", "video": [images], "times": FrameTimes}, then
        {"type": "image", "image": image} for each image, then one {"type": "text", "text": str}.
    """
    video = {"video": list(item.frames), "times": item.times} if item.frames else None
    return user_turn(kind, item, video, num_frames=len(item.frames), **options)


def user_turn(
    kind: InputKind,
    item: Any,
    video: dict[str, Any] | None,
    *,
    family: Family,
    num_frames: int,
    gold_answer: str | None = None,
    few_shot: bool = True,
    style: str = "paper",
) -> list[dict[str, Any]]:
    """The turn of `build_prompt` for an item whose media may be references.

    Args:
        kind: picks the task and the evidence key.
        item: its instruction, text and images. Control tokens of the chat format in the words (such as <|image_pad|>)
            are broken up, so that data can neither forge a turn nor add media.
        video: what the video part holds.
        family: the Reasoner's family, which decides the units of boxes.
        gold_answer: the known answer, for annotation.
        few_shot: put the template's worked examples in.
        style: one of `STYLES`.
    """
    if kind not in INPUT_KINDS:
        raise ConfigError(f"kind must be one of {', '.join(INPUT_KINDS)}; got {kind!r}")
    if style not in STYLES:
        raise ConfigError(f"prompt style must be one of {', '.join(STYLES)}; got {style!r}")
    if gold_answer is not None and not gold_answer.strip():
        raise ConfigError("gold_answer must not be empty; leave it out (None) where the answer is not known")
    evidence = KINDS[EVIDENCE_KEY_OF_KIND[kind]]
    if not {"text": item.text.strip(), "an image": item.images, "frames": num_frames}[evidence.medium]:
        raise DataError(f"an item of kind {kind} must have {evidence.medium}; it has none")
    units = box_convention(family)
    sizes = {"units": BOX_UNITS[units], "num_images": len(item.images), "num_frames": num_frames}

    def box(corners: Sequence[int], size: tuple[int, int]) -> str:
        return json.dumps(example_box(corners, size, units))

    text = _TEMPLATES.get_template(f"{style}.jinja").render(
        kind=kind,
        ask=_compiled(evidence.ask[style]).render(sizes),
        instruction=break_tokens(item.instruction.strip()),
        text=break_tokens(item.text.strip()),
        gold_answer=break_tokens((gold_answer or "").strip()),
        few_shot=few_shot,
        box=box,
    )
    parts = [] if video is None else [{"type": "video", **video}]
    parts += [{"type": "image", "image": image} for image in item.images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text.strip()}]}]


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _TEMPLATES.from_string(text)


def style_words(style: str) -> str:
    """All words of a style, to tell whether they have changed."""
    words = (_FOLDER / f"{style}.jinja").read_text("utf-8") + "".join(kind.ask[style] for kind in KINDS.values())
    return words + "".join(f"{units.prompt}{units.compact}" for units in BOX_UNITS.values())
