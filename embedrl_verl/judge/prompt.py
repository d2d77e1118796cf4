# SPDX-License-Identifier: Apache-2.0
"""The judge's prompt: instruction, task, images of the judged input, numbered candidates, and the judged T-CoT last.

Everything before the judged T-CoT is the same for all rollouts of a prompt, so the server's prefix cache reads it once.

T-CoTs are written by the policy that is rewarded for them. Chat control tokens and the template's own tags in them are
broken up, so that a text can neither leave its place nor forge a turn, a candidate or an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedrl_verl.judge.style import JudgeStyle, load_judge_style
from embedrl_verl.rewards import Side
from embedrl_verl.tcot import TCoT
from embedrl_verl.tcot.harmless import break_control, break_tags
from embedrl_verl.tcot.styles import fill


@dataclass(frozen=True)
class JudgePrompt:
    """The shared part of a list's prompts; `messages` completes it for one judged T-CoT."""

    style: JudgeStyle
    side: Side
    head: str
    body: str
    images: tuple[str, ...] = ()

    def messages(self, judged: TCoT) -> list[dict[str, Any]]:
        """One user turn in OpenAI's chat format; a plain string without images, as the simplest servers want it."""
        template = self.style.sides[self.side]
        last = fill(template.judged, text=shown_text(judged, self.style))
        if not self.images:
            return [{"role": "user", "content": self._join(self.head, self.body, last)}]
        before = self._join(self.head, template.images)
        content: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
        content += [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        content.append({"type": "text", "text": self._join(self.body, last)})
        return [{"role": "user", "content": content}]

    def _join(self, *blocks: str) -> str:
        return self.style.join.join(block for block in blocks if block)


def judge_prompt(
    candidates: Sequence[TCoT],
    *,
    side: Side,
    style: str | JudgeStyle = "paper",
    instruction: str | None = None,
    images: Sequence[str] = (),
) -> JudgePrompt:
    """The shared part of the prompts of one list.

    Args:
        candidates: T-CoTs of the other side in the order of their numbers.
        side: of the judged rows.
        style: a name, or a style of one's own.
        instruction: of the judged rows' input; styles may leave it out.
        images: data: URLs of the judged rows' input.

    Raises:
        ConfigError: an unknown style.
    """
    chosen = load_judge_style(style) if isinstance(style, str) else style
    template = chosen.sides[side]
    wish = fill(chosen.instruction, value=_harmless(instruction, chosen)) if instruction else ""
    head = (fill(block, task=template.task, instruction=wish) for block in chosen.head)
    numbered = chosen.candidates.join(
        fill(chosen.candidate, number=str(number), text=shown_text(tcot, chosen))
        for number, tcot in enumerate(candidates, start=1)
    )
    body = (fill(block, candidates=numbered) for block in chosen.body)
    return JudgePrompt(
        chosen, side, chosen.join.join(filter(None, head)), chosen.join.join(filter(None, body)), tuple(images)
    )


def judge_messages(
    candidates: Sequence[TCoT],
    judged: TCoT,
    *,
    side: Side,
    style: str | JudgeStyle = "paper",
    instruction: str | None = None,
    images: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The prompt of one judged row in OpenAI's chat format; arguments as `judge_prompt`."""
    return judge_prompt(candidates, side=side, style=style, instruction=instruction, images=images).messages(judged)


def shown_text(tcot: TCoT, style: JudgeStyle) -> str:
    """What a judge reads of a T-CoT: its text or its answer ("" if it has none), made harmless."""
    return _harmless(tcot.answer if style.shows == "answer" else tcot.text, style)


def _harmless(text: str, style: JudgeStyle) -> str:
    if style.one_line:
        for separator in style.separators:
            text = text.replace(separator, " ")
        text = " ".join(text.split())
    text = text.strip()
    return break_tags(break_control(text), style.delimiters)
