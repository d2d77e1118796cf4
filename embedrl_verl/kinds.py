# SPDX-License-Identifier: Apache-2.0
"""The kinds of input, and the evidence that each kind calls for.

A kind picks the prompt template and the evidence key: text → keywords, images and pages → boxes, video → key frames.
This module imports nothing of the package, so that every room may import it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

InputKind: TypeAlias = Literal[
    "query_text",
    "query_image",
    "query_page",
    "query_video",
    "query_text_to_video",
    "target_text",
    "target_image",
    "target_page",
    "target_video",
]

# Keys are those of `embedrl_verl.tcot.evidence`. A text query that looks for a video has no frames to point at: its
# evidence are the words of the text.
EVIDENCE_KEY_OF_KIND: Mapping[InputKind, str] = MappingProxyType(
    {
        "query_text": "text_keywords",
        "query_image": "bbox_2d",
        "query_page": "bbox_2d",
        "query_video": "key_frames",
        "query_text_to_video": "text_keywords",
        "target_text": "text_keywords",
        "target_image": "bbox_2d",
        "target_page": "bbox_2d",
        "target_video": "key_frames",
    }
)
INPUT_KINDS: tuple[InputKind, ...] = tuple(EVIDENCE_KEY_OF_KIND)
