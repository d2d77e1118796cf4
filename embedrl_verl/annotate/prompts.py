# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: chat messages with decoded media, and how a reply is drawn. Words and pixels are those of the
rollout, so that a T-CoT is of the language, the box units and the frame numbers that RL will see. Draws depend on a
pair's id alone, so an answer does not depend on what was asked before or beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import jinja2

from embedrl_verl.annotate.answers import Entry
from embedrl_verl.data.media import LoadedItem, MediaLimits, fit_clip, fit_image, load_item
from embedrl_verl.data.schema import PairRecord, Side, input_kind
from embedrl_verl.families import Family
from embedrl_verl.kinds import InputKind
from embedrl_verl.tcot import build_prompt
from embedrl_verl.tcot.harmless import break_control

Messages: TypeAlias = list[dict[str, Any]]
_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_SHOWN_REPLY = 4000  # characters of a bad reply that are shown again
ALMOST_GREEDY = 0.01
"""Temperature at which vLLM samples with a seed and comes to what greedy decoding gives (it raises lower ones to this).
Its CPU sampler heeds seeds only while every request of a batch is sampled with one, so a greedy request would make the
draws of those beside it depend on chance."""


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
class Sampling:
    """How one reply is drawn: as one of `choices`, where the backend can see to it."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What to find out about a record, the entries of earlier tries, and where the record is."""

    record: PairRecord
    name: str
    tries: tuple[Entry, ...] = ()
    file: str = ""
    row: int = 0


@dataclass(frozen=True)
class DrawSettings:
    """How replies are drawn; `retry_temperature` is of those that are drawn again, at least."""

    tries: int = 3
    temperature: float = 0.0
    retry_temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0

    def sampling(self, question: Question, *, redraw: bool, **more: Any) -> Sampling:
        """Of a question's next try. `redraw`: a refused reply is drawn again, so no try is quite greedy."""
        number, temperature = len(question.tries), self.temperature
        if redraw and self.tries > 1:
            temperature = max(ALMOST_GREEDY, temperature, self.retry_temperature if number else 0.0)
        seed = seed_of(self.seed, question.record.pair_id, question.name, number)
        return Sampling(self.max_tokens, temperature, seed=seed, **more)


@dataclass(frozen=True)
class TcotPrompts:
    """How T-CoTs are asked for: the model's family (units of boxes), templates, sizes and root of media."""

    family: Family
    style: str
    few_shot: bool
    limits: MediaLimits
    media_root: str | None = None

    def prompt(self, record: PairRecord, side: Side, gold_answer: str | None = None) -> Prompt:
        """The first question about a side. Decodes media (call it in a thread); raises MediaError."""
        item = load_item(record.item(side), self.media_root, max_frames=self.limits.max_frames)
        return self.of(input_kind(record, side), item, gold_answer)

    def of(self, kind: InputKind, item: LoadedItem, gold_answer: str | None = None) -> Prompt:
        """The question about a decoded item."""
        options: dict[str, Any] = {"gold_answer": gold_answer, "few_shot": self.few_shot, "style": self.style}
        messages = build_prompt(kind, item, family=self.family, **options)
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


def seed_of(seed: int, *key: object) -> int:
    """A seed in [0, 2^31) for one request."""
    return _number(seed, *key) >> 33


def is_in_share(share: float, seed: int, *key: object) -> bool:
    """Whether a key belongs to a random share of all keys. Raising the share only adds keys."""
    return _number(seed, *key) < share * 2.0**64


def _number(*key: object) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(repr(key).encode(errors="surrogatepass")).digest()[:8], "big")
