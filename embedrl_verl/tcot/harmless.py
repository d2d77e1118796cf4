# SPDX-License-Identifier: Apache-2.0
"""Texts that models or data wrote, made safe to show inside a prompt: they can neither forge a turn or a medium, nor
leave the tags that a template puts around them."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import chain

# Marks of the chat formats in use: <|...|> (Qwen, Llama 3, Phi), <｜...｜> (DeepSeek), <start_of_turn> (Gemma), [INST]
# (Mistral, Llama 2), sentence marks, image and embedding placeholders.
# Each pattern starts with a literal or a set, which `re` looks for fast.
_CONTROL = (
    re.compile(
        r"<(?=[|｜]|/?(?:s|bos|eos|pad|unk|mask|emb|img|image|video|audio|think|tool_call|tool_response"
        r"|(?:start|end)_of_\w+|(?:image|video|audio)_\w+|im_\w+)>|</?SYS>>)",
        re.IGNORECASE,
    ),
    re.compile(r"[|｜](?=>)"),
    re.compile(r"\[(?=/?(?:INST|IMG|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\w*\])", re.IGNORECASE),
)


def break_control(text: str) -> str:
    """The text with a space in every mark of a chat format."""
    for control in _CONTROL:
        text = control.sub(r"\g<0> ", text)
    return text


def break_tags(text: str, names: tuple[str, ...]) -> str:
    """The text with "&lt;" for the opening bracket of tags of these names, whatever white space is in them.

    Look-alikes count as tags: fullwidth brackets and strokes, and invisible characters anywhere in them.
    """
    return _tags(names).sub("&lt;", text) if names else text


@lru_cache
def _tags(names: tuple[str, ...]) -> re.Pattern[str]:
    # No part can match what its neighbour matches, so a bracket is looked at in linear time.
    hidden = _invisible()
    gap = rf"[\s{hidden}]*"
    spelt = "|".join(f"[{hidden}]*".join(map(re.escape, name)) for name in names)
    return re.compile(rf"[<＜](?={gap}(?:[/／]{gap})?(?:{spelt})\b)", re.IGNORECASE)


_WITH_FORMAT_CHARACTERS = (range(0x10000), range(0x11000, 0x1E000), range(0xE0000, 0xE0100))
"""Looking at all of Unicode would hold up an event loop for 0.1 s."""


@lru_cache
def _invisible() -> str:
    """Unicode's format characters (category Cf: zero width, direction, soft hyphen) as ranges for a set of `re`."""
    ranges: list[list[int]] = []
    for code in chain(*_WITH_FORMAT_CHARACTERS):
        if unicodedata.category(chr(code)) == "Cf":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
