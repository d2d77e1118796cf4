# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: chat messages with decoded media, at the size at which RL will show them to the Reasoner.

`tcot_prompt` uses the templates of the rollout (`embedrl_verl.tcot.build_prompt`) and the same fitting of images and
clips, so that an annotated T-CoT is of the language, the box units and the frame numbers that RL will see.

A reply that is no T-CoT is asked for again: with the broken rules said (`again`, "explain"), or as the same question
with another seed and a temperature ("resample", for models that know no conversation).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from string import Template
from typing import Any, TypeAlias

import yaml

from embedrl_verl.data.media import MediaLimits, fit_clip, fit_image, load_item
from embedrl_verl.data.schema import PairRecord, Side, input_kind
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family, token_side
from embedrl_verl.tcot import build_prompt
from embedrl_verl.tcot.harmless import break_control
from embedrl_verl.tcot.prompts import style_words

Messages: TypeAlias = list[dict[str, Any]]
_SHOWN_REPLY = 4000  # characters of a bad reply that are shown again
_TEMPLATES = resources.files("embedrl_verl.annotate").joinpath("templates")


@dataclass(frozen=True)
class Prompt:
    """One request, before it is encoded for a server or an engine.

    Attributes:
        messages: chat messages; content is a string or parts {"type": "text", "text"}, {"type": "image", "image": RGB
            image} and {"type": "video", "video": [RGB images of one size, even in number], "times": FrameTimes}.
        original_sizes: (width, height) in pixels of each image of the item as stored.
        seen_sizes: the same, as the model sees it.
        num_frames: frames of the clip that can be named (an odd clip repeats its last one for the model).
    """

    messages: Messages
    original_sizes: tuple[tuple[int, int], ...] = ()
    seen_sizes: tuple[tuple[int, int], ...] = ()
    num_frames: int = 0


@dataclass(frozen=True)
class TcotPrompts:
    """How T-CoTs are asked for.

    Attributes:
        family: of the model that writes them (units of boxes).
        style, few_shot: the templates, see `build_prompt`.
        limits: sizes of media.
        media_root: folder that media paths are relative to.
    """

    family: Family
    style: str
    few_shot: bool
    limits: MediaLimits
    media_root: str | None = None

    def __post_init__(self) -> None:
        if self.limits.token_side != token_side(self.family):
            raise ConfigError(
                f"limits must be of {self.family}'s visual tokens, {token_side(self.family)} px; "
                f"got {self.limits.token_side}"
            )

    def prompt(self, record: PairRecord, side: Side, gold_answer: str | None = None) -> Prompt:
        """The first question about a side. Decodes media: call it in a thread."""
        item = load_item(record.item(side), self.media_root, max_frames=self.limits.max_frames)
        messages = build_prompt(
            input_kind(record, side),
            item,
            family=self.family,
            gold_answer=gold_answer,
            few_shot=self.few_shot,
            style=self.style,
        )
        fitted = [{**message, "content": fit_parts(message["content"], self.limits)} for message in messages]
        seen = [part["image"].size for message in fitted for part in message["content"] if part["type"] == "image"]
        return Prompt(fitted, tuple(image.size for image in item.images), tuple(seen), len(item.frames))


def again(prompt: Prompt, reply: str, problems: Sequence[str]) -> Prompt:
    """The question, the reply that cannot be used, and what is wrong with it."""
    template = again_template()
    lines = "\n".join(Template(template["problem"]).substitute(problem=break_control(problem)) for problem in problems)
    said = break_control(reply.strip())[:_SHOWN_REPLY] or template["empty"]
    turns = [
        {"role": "assistant", "content": said},
        {"role": "user", "content": Template(template["again"]).substitute(problems=lines)},
    ]
    return replace(prompt, messages=[*prompt.messages, *turns])


@functools.cache
def again_template() -> dict[str, str]:
    """The texts of `templates/again.yaml`."""
    texts: dict[str, str] = yaml.safe_load(_TEMPLATES.joinpath("again.yaml").read_text(encoding="utf-8"))
    return texts


def templates_digest(style: str) -> str:
    """SHA-256 of all texts that a question is made of, so that answers to other wordings do not mix."""
    return hashlib.sha256((style_words(style) + json.dumps(again_template(), sort_keys=True)).encode()).hexdigest()


def gold_answer_of(record: PairRecord, side: Side) -> str | None:
    """The answer that an annotator of a query may be told: the target's text. None where there is none to tell."""
    return (record.target.text.strip() or None) if side == "query" else None


def fit_parts(content: Any, limits: MediaLimits) -> Any:
    """A message's content with images and clips at the size at which a model with these limits reads them."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "image":
            parts.append({"type": "image", "image": fit_image(part["image"], limits)})
        elif part["type"] == "video":
            clip = fit_clip(part["video"], limits)
            parts.append({**part, "video": clip, "times": part["times"].padded(len(clip))})
        else:
            parts.append(part)
    return parts
