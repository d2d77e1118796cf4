# SPDX-License-Identifier: Apache-2.0
"""The prompt of `build_messages` as a chat template, for servers and for exports."""

from __future__ import annotations

import json
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder.profiles import EMB_TOKEN, EmbedderProfile
from embedrl_verl.families import Family, facts_of

TEMPLATE_FILE = Path(__file__).with_name("embedding_template.jinja")


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
