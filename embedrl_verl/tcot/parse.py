# SPDX-License-Identifier: Apache-2.0
"""Reads a T-CoT: strict about its form, generous about its content.

`parse_tcot` never raises and keeps whatever is readable, because a row is embedded whatever the policy wrote;
`problems` says why it is not well formed. Time is linear in the text.

    tcot = parse_tcot(text, num_frames=8)
    tcot.is_well_formed, tcot.key_frames, tcot.problems
"""

from __future__ import annotations

import re
from typing import Any

from embedrl_verl.tcot.evidence import KINDS
from embedrl_verl.tcot.evidence.kind import InputSize
from embedrl_verl.tcot.form import TCoT
from embedrl_verl.tcot.json_objects import find_objects
from embedrl_verl.tcot.problems import Problems

PARTS = ("thinking", "rethink", "answer")
_TAG = re.compile(r"</?(?:thinking|rethink|answer)>")
_TAGS_IN_ORDER = [tag for part in PARTS for tag in (f"<{part}>", f"</{part}>")]


def parse_tcot(text: str, *, num_frames: int | None = None, num_images: int | None = None) -> TCoT:
    """Read a T-CoT.

    Args:
        text: what the Reasoner wrote.
        num_frames: frames of the input; a key frame above it is a problem and left out. None = not known.
        num_images: images of the input; a box in an image above it is a problem and left out. None = not known.

    Evidence is read from the JSON objects inside `<thinking>`; where there is none, from those elsewhere.
    Of a part whose tags are broken, what lies between its opening tag and the next tag (or the end), or between its
    closing tag and the tag before it, is taken as its content.
    """
    problems = Problems()
    spans = _find_parts(text, problems)
    contents = {part: text[slice(*spans[part])].strip() if part in spans else "" for part in PARTS}
    for part in PARTS:
        if part in spans and not contents[part]:
            problems.add(f"<{part}> must not be empty")

    objects = list(find_objects(text))
    first, last = spans.get("thinking", (0, 0))
    inside = [found for start, end, found in objects if first <= start and end <= last]
    if len(inside) != 1:
        problems.add("<thinking> must hold exactly one JSON object", len(inside))
    if len(objects) > len(inside):
        problems.add("no JSON object may stand outside <thinking>", len(objects) - len(inside))
    evidence: dict[str, list[Any]] = {key: [] for key in KINDS}
    read = inside or [found for _, _, found in objects]
    for found in read:
        for key, kind in KINDS.items():
            evidence[key] += kind.read(found, InputSize(num_frames, num_images), problems)
    if read and not any(key in KINDS for found in read for key, _ in found):
        problems.add(f"the JSON object must have one of the keys {', '.join(KINDS)}")
    pointers = {key: tuple(found) for key, found in evidence.items()}
    return TCoT(text, **contents, evidence=pointers, problems=problems.lines())


def _find_parts(text: str, problems: Problems) -> dict[str, tuple[int, int]]:
    """Where the content of each part lies, tags excluded."""
    tags = list(_TAG.finditer(text))
    names = [tag.group() for tag in tags]
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(text)]  # text between two tags: edges[2i], [2i+1]
    if names == _TAGS_IN_ORDER:
        if any(text[edges[2 * gap] : edges[2 * gap + 1]].strip() for gap in (0, 2, 4, 6)):
            problems.add("nothing but white space may stand outside the three parts")
    else:
        problems.add(
            "the tags must be <thinking> <rethink> <answer>, each opened and closed once, in this order", names
        )
    spans: dict[str, tuple[int, int]] = {}
    for part in PARTS:
        if f"<{part}>" in names:
            gap = names.index(f"<{part}>") + 1
        elif f"</{part}>" in names:
            gap = names.index(f"</{part}>")
        else:
            continue
        spans[part] = edges[2 * gap], edges[2 * gap + 1]
    return spans
