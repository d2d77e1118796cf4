# SPDX-License-Identifier: Apache-2.0
"""The one message builder: what an Embedder reads of an item, its T-CoT and the evidence (method section 3).

Contrastive training, reward, evaluation and serving all call `build_messages`, so the Embedder sees the same thing
everywhere; `embedding_template` is its prompt as a chat template, for servers and exports. Text can hold anything, also
what a policy wrote: control tokens in it are broken up, so that it can neither forge a turn nor add media placeholders.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedrl_verl.embedder.profiles import EMB_TOKEN, EMBED_RL, EmbedderProfile
from embedrl_verl.tcot import cut_evidence, parse_tcot
from embedrl_verl.tcot.harmless import break_tokens

if TYPE_CHECKING:
    from PIL import Image

    from embedrl_verl.config.schema import EvidenceConfig
    from embedrl_verl.data.media import LoadedItem, MediaLimits
    from embedrl_verl.tcot import TCoT
from embedrl_verl.families import Family, facts_of

TEMPLATE_FILE = Path(__file__).with_name("embedding_template.jinja")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class EmbedInput:
    """One thing to embed: decoded media and text, what the Reasoner wrote about it, and the evidence cut for it."""

    item: LoadedItem
    tcot: TCoT | None = None
    evidence: tuple[Image.Image, ...] = ()

    @classmethod
    def with_tcot(
        cls,
        item: LoadedItem,
        text: str,
        family: Family,
        limits: EvidenceConfig,
        seen_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> EmbedInput:
        """The item with the T-CoT `text`, parsed, and its evidence cut from the originals.

        Args:
            family: of the Reasoner that wrote the text.
            limits: what may be cut.
            seen_sizes: (width, height) in pixels of each image as the Reasoner saw it; None = it saw the originals.
        """
        tcot = parse_tcot(text, num_frames=len(item.frames) or None, num_images=len(item.images) or None)
        evidence = cut_evidence(
            tcot,
            images=item.images,
            frames=item.frames,
            family=family,
            resized_sizes=seen_sizes,
            min_side=limits.min_side,
            max_aspect=limits.max_aspect,
            max_evidence=limits.max_items,
        )
        return cls(item, tcot, evidence.images)


def build_messages(
    item: LoadedItem,
    tcot: TCoT | None = None,
    evidence: Sequence[Image.Image] = (),
    *,
    profile: EmbedderProfile = EMBED_RL,
) -> list[dict[str, Any]]:
    """Chat messages whose content parts are {"type": "image" | "video" | "text", ...} in reading order.

    User turn: media, instruction and text, the `<thinking>` block, evidence as images, the rest of the T-CoT, the
    suffix. A T-CoT without `</thinking>` is given whole, evidence after it. A video part holds its frames as a list of
    images and their "times" (`FrameTimes`). The embedding is read at the end of the profile's tail, which is the
    assistant's message; without a tail, at the end of the opened assistant turn.
    """
    messages: list[dict[str, Any]] = []
    instruction = item.instruction.strip()
    if profile.instruction_in_system:
        instruction = instruction or profile.default_instruction
        if profile.end_instruction_with_stop and not _ends_in_punctuation(instruction):
            instruction += "."
        messages.append({"role": "system", "content": [_text(instruction)]})
        instruction = ""

    content: list[dict[str, Any]] = []
    if item.frames and not profile.frames_as_images:
        content.append({"type": "video", "video": list(item.frames), "times": item.times})
    images = [*item.images, *(item.frames if profile.frames_as_images else ())]
    content += [{"type": "image", "image": image} for image in images]
    text = " ".join(part for part in (instruction, item.text) if part)
    thinking, rest = ("", "") if tcot is None else tcot.sections()
    thinking, rest = thinking.lstrip(), rest.rstrip()
    if not (content or text or thinking):
        text = profile.empty_text
    before, after = _lines(text, thinking), _lines(rest, profile.suffix)
    if evidence:
        content.append(_text(before))
        content += [{"type": "image", "image": image} for image in evidence]
        content.append(_text(after))
    else:
        content.append(_text(before + after if rest else _lines(before, after)))
    messages.append({"role": "user", "content": [part for part in content if part.get("text") != ""]})
    if profile.tail:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": profile.tail}]})
    return messages


def render_prompt(messages: Sequence[dict[str, Any]], *, chat: bool = True) -> str:
    """The prompt string, one placeholder per image or video, ending at the token that is pooled.

    With `chat`, ChatML as all Qwen-VL templates write it, without the default system turn that some add. Without, the
    user turn alone: bare placeholders and text joined by single spaces.
    """
    if not chat:
        parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
        return " ".join(_placeholder(part, bare=True) for part in parts)
    turns = []
    for message in messages:
        body = "".join(_placeholder(part) for part in message["content"])
        turns.append(f"<|im_start|>{message['role']}\n{body}")
    opened = "" if messages[-1]["role"] == "assistant" else "<|im_end|>\n<|im_start|>assistant\n"
    return "<|im_end|>\n".join(turns) + opened


def _placeholder(part: dict[str, Any], *, bare: bool = False) -> str:
    if part["type"] == "text":
        return str(part["text"])
    pad = IMAGE_PAD if part["type"] == "image" else VIDEO_PAD
    return pad if bare else f"{VISION_START}{pad}{VISION_END}"


def _ends_in_punctuation(text: str) -> bool:
    """In any script, by Unicode category; true of an empty text too."""
    return not text or unicodedata.category(text[-1]).startswith("P")


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _text(text: str) -> dict[str, Any]:
    # Of every family, not of one tokenizer: the exported template follows the same rule and must give the same string.
    return {"type": "text", "text": break_tokens(text, EMB_TOKEN.strip("<>"))}


def embedding_template(profile: EmbedderProfile, limits: MediaLimits, family: Family, longest: int = 0) -> str:
    """The chat template (Jinja) of a profile; text cannot forge control tokens.

    Args:
        limits: by which it counts media.
        longest: tokens beyond which the prompt is cut behind the template's back: what could lose its end is refused.
            0 = the reader refuses what is too long by itself, as vLLM does.
    """
    values = {
        "chat": profile.chat,
        "suffix": profile.suffix,
        "tail": profile.tail,
        "in_system": profile.instruction_in_system,
        "default_instruction": profile.default_instruction,
        "punctuation": _punctuation() if profile.end_instruction_with_stop else "",
        "empty_text": profile.empty_text,
        "emb": EMB_TOKEN,
        "longest": longest,
        "image": [limits.image_min_tokens, limits.most_tokens(is_frame=False)],
        "frame": [limits.frame_min_tokens, limits.most_tokens(is_frame=True)],
        "clip": limits.most_tokens(is_frame=True) * limits.max_frames if facts_of(family).limits_whole_clip else 0,
        "token_side": limits.token_side,
        "frames": limits.max_frames,
    }
    # Jinja does not join the surrogate pairs that JSON's own escapes are made of.
    head = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in values.items()]
    return "".join(head) + TEMPLATE_FILE.read_text(encoding="utf-8")


@lru_cache
def _punctuation() -> str:
    """Every character of Unicode's punctuation categories, which Jinja cannot ask for."""
    return "".join(one for one in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(one).startswith("P"))
