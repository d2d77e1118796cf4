# SPDX-License-Identifier: Apache-2.0
"""The judge's prompt: instruction, task, images of the judged input, numbered candidates, and the judged T-CoT last.

Everything before the judged T-CoT is the same for all rollouts of a prompt, so the server's prefix cache reads it once.

T-CoTs are written by the policy that is rewarded for them. Chat control tokens and the template's own tags in them are
broken up, so that a text can neither leave its place nor forge a turn, a candidate or an image.

A style is a Jinja file in `templates/` with

    shows        "text": the whole T-CoT; "answer": what stands in its <answer>
    delimiters   names of tags that the template uses; tags of these names in a shown text are broken up
    separator    what parts text and number of a candidate that is one line: white space in a shown text becomes single
                 spaces, and the separator a space; "": candidates may have lines
    join         what stands between candidates, and between the parts of the prompt; empty parts are left out
    head(side, instruction, images), candidate(number, text), judged(side, text)     macros: the parts
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import Side
from embedrl_verl.tcot import TCoT
from embedrl_verl.tcot.harmless import break_control, break_tags

JUDGE_STYLES = ("paper", "compact")
_SMALL = 128 * 128
"""Below this many pixels PNG costs little and loses nothing."""


@dataclass(frozen=True)
class JudgePrompt:
    """The shared part of a list's prompts: `head`, then images, then `body`; `messages` completes it."""

    style: Any
    side: Side
    head: str
    body: str
    images: tuple[str, ...] = ()

    def messages(self, judged: TCoT) -> list[dict[str, Any]]:
        """One user turn in OpenAI's chat format; a plain string without images, as the simplest servers want it."""
        last = str(self.style.judged(self.side, _shown(judged, self.style)))
        if not self.images:
            text = self.style.join.join(part for part in (self.head, self.body, last) if part)
            return [{"role": "user", "content": text}]
        content: list[dict[str, Any]] = [{"type": "text", "text": self.head}] if self.head else []
        content += [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        content.append({"type": "text", "text": f"{self.body}{self.style.join}{last}"})
        return [{"role": "user", "content": content}]


def judge_prompt(
    candidates: Sequence[TCoT],
    *,
    side: Side,
    style: str = "paper",
    instruction: str | None = None,
    images: Sequence[str] = (),
) -> JudgePrompt:
    """The shared part of the prompts of one list.

    Args:
        candidates: T-CoTs of the other side in the order of their numbers.
        side: of the judged rows.
        instruction: of the judged rows' input; styles may leave it out.
        images: data: URLs of the judged rows' input.
    """
    template = judge_style(style)
    head = template.head(side, _harmless(instruction or "", template), bool(images))
    numbered = (template.candidate(number, _shown(tcot, template)) for number, tcot in enumerate(candidates, start=1))
    return JudgePrompt(template, side, head, template.join.join(numbered), tuple(images))


@functools.cache
def judge_style(name: str) -> Any:
    """The variables and macros of a style's template."""
    if name not in JUDGE_STYLES:
        raise ConfigError(f"the judge's style must be one of {', '.join(JUDGE_STYLES)}; got {name!r}")
    loader = jinja2.PackageLoader("embedrl_verl.judge")
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined).get_template(f"{name}.jinja").module


def _shown(tcot: TCoT, style: Any) -> str:
    return _harmless(tcot.answer if style.shows == "answer" else tcot.text, style)


def _harmless(text: str, style: Any) -> str:
    if style.separator:
        text = " ".join(text.replace(style.separator, " ").split())
    return break_tags(break_control(text.strip()), style.delimiters)


def image_urls(images: Iterable[Image.Image], *, max_side: int = 768) -> list[str]:
    """Images as data: URLs, RGB, no side above `max_side` pixels; PNG if small, else JPEG.

    Takes milliseconds an image: call it once a prompt, outside of an event loop.
    """
    urls = []
    for image in images:
        shown = image.convert("RGB")  # a copy, so that the caller's image keeps its size
        if max(shown.size) > max_side:
            shown.thumbnail((max_side, max_side))
        kind = "png" if shown.width * shown.height <= _SMALL else "jpeg"
        buffer = io.BytesIO()
        shown.save(buffer, format=kind, **({"quality": 92} if kind == "jpeg" else {}))
        urls.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls
