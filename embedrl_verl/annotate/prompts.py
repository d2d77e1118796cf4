# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: chat messages with decoded media. Words and pixels are those of the rollout, so that a T-CoT
is of the language, the box units and the frame numbers that RL will see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import jinja2

from embedrl_verl.data.media import MediaLimits, fit_clip, fit_image, load_item
from embedrl_verl.data.schema import PairRecord, Side, input_kind
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family, token_side
from embedrl_verl.tcot import build_prompt
from embedrl_verl.tcot.harmless import break_control

Messages: TypeAlias = list[dict[str, Any]]
_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_SHOWN_REPLY = 4000  # characters of a bad reply that are shown again


@dataclass(frozen=True)
class Prompt:
    """One request, before it is encoded for a server or an engine. Its `messages` have parts {"type": "text", "text"},
    {"type": "image", "image": RGB image} and {"type": "video", "video": [RGB images, even in number], "times":
    FrameTimes}. Sizes are (width, height) of each image, as stored and as the model sees it; `num_frames` those of the
    clip that can be named (an odd clip repeats its last one for the model)."""

    messages: Messages
    original_sizes: tuple[tuple[int, int], ...] = ()
    seen_sizes: tuple[tuple[int, int], ...] = ()
    num_frames: int = 0


@dataclass(frozen=True)
class TcotPrompts:
    """How T-CoTs are asked for: the model's family (units of boxes), templates, sizes and root of media."""

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
        """The first question about a side. Decodes media (call it in a thread); raises MediaError."""
        item = load_item(record.item(side), self.media_root, max_frames=self.limits.max_frames)
        options: dict[str, Any] = {"gold_answer": gold_answer, "few_shot": self.few_shot, "style": self.style}
        messages = build_prompt(input_kind(record, side), item, family=self.family, **options)
        fitted = [{**message, "content": _fitted(message["content"], self.limits)} for message in messages]
        seen = [part["image"].size for message in fitted for part in message["content"] if part["type"] == "image"]
        return Prompt(fitted, tuple(image.size for image in item.images), tuple(seen), len(item.frames))


def again(prompt: Prompt, reply: str, problems: Sequence[str]) -> Prompt:
    """The question, the reply that cannot be used, and what is wrong with it."""
    shown = break_control(reply.strip())[:_SHOWN_REPLY] or "(no text)"
    wrong = TEMPLATES.get_template("again.jinja").render(problems=[break_control(problem) for problem in problems])
    turns = [{"role": "assistant", "content": shown}, {"role": "user", "content": wrong}]
    return replace(prompt, messages=[*prompt.messages, *turns])


def digest(*templates: str, words: str = "") -> str:
    """SHA-256 of all words that questions are made of, so that answers to other wordings do not mix."""
    texts = [(_FOLDER / name).read_text("utf-8") for name in templates]
    return hashlib.sha256("".join([words, *texts]).encode()).hexdigest()


def gold_answer_of(record: PairRecord, side: Side) -> str | None:
    """The answer that an annotator of a query may be told: the target's text. None where there is none to tell."""
    return (record.target.text.strip() or None) if side == "query" else None


def _fitted(content: Sequence[dict[str, Any]], limits: MediaLimits) -> list[dict[str, Any]]:
    """Parts with images and clips at the size at which a model with these limits reads them."""

    def fit(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {"type": "image", "image": fit_image(part["image"], limits)}
        if part["type"] == "video":
            clip = fit_clip(part["video"], limits)
            return {**part, "video": clip, "times": part["times"].padded(len(clip))}
        return part

    return [fit(part) for part in content]
