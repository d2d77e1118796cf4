# SPDX-License-Identifier: Apache-2.0
"""Texts that models or data wrote, made safe to show inside a prompt: they can neither forge a turn or a medium, nor
leave the tags that a template puts around them."""

from __future__ import annotations

import re

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


def break_tokens(text: str, *names: str) -> str:
    """The text with spaces in control tokens of Qwen's chat format, `<|image_pad|>` as `< |image_pad| >`, and in
    `<name>` of these names. For models whose tokenizer is known; nothing else changes."""
    tokens = "|".join([r"\|\w+\|", *map(re.escape, names)])
    return re.sub(f"<({tokens})>", r"< \1 >", text)


def break_control(text: str) -> str:
    """The text with a space in every mark of any chat format, for models of which nothing is known."""
    for control in _CONTROL:
        text = control.sub(r"\g<0> ", text)
    return text


def break_tags(text: str, names: tuple[str, ...]) -> str:
    """The text with "&lt;" for the opening bracket of tags of these names, whatever white space is in them."""
    if not names:
        return text
    # The stroke comes with its white space, so that a bracket is looked at in linear time.
    return re.sub(rf"<(?=\s*(?:/\s*)?(?:{'|'.join(map(re.escape, names))})\b)", "&lt;", text, flags=re.IGNORECASE)
