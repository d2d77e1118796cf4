# SPDX-License-Identifier: Apache-2.0
"""Is a reply a T-CoT that can be used? Strict form, and evidence that points at something: at level "usable" one piece
must hold, at "strict" every piece; "off" asks for the form alone.

A box holds if it lies in its image and can be cut as the Embedder will cut it, a key frame if the clip has it (the
parser sees to that), a keyword if it occurs in the side's text or instruction (case, width and white space aside).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.data.identity import normalise_text
from embedrl_verl.data.schema import Item, PairRecord, Side, input_kind
from embedrl_verl.errors import DataError
from embedrl_verl.families import BOX_UNITS, Family, box_convention
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot import TCoT, cut_evidence, parse_tcot
from embedrl_verl.tcot.problems import Problems

EvidenceLevel: TypeAlias = Literal["off", "usable", "strict"]
OVERSHOOT = 0.01
"""Share of an image's side by which a box may lie outside: rounding, and families that count to 1000 or to 999."""
CUT_OFF = "the reply must end before the limit of tokens"


def check_tcot(
    reply: Reply, record: PairRecord, side: Side, prompt: Prompt, family: Family, level: EvidenceLevel
) -> list[str]:
    """Why a reply is refused, [] if it is good."""
    needs, item = EVIDENCE_KEY_OF_KIND[input_kind(record, side)], record.item(side)
    tcot = parse_tcot(reply.text, num_frames=prompt.num_frames or None, num_images=len(prompt.original_sizes) or None)
    problems = [*([CUT_OFF] if reply.cut_off else []), *tcot.problems]
    if not tcot.has_evidence(needs):
        problems.append(f"the JSON object must have the key {needs} with at least one valid entry")
    if problems or level == "off":
        return problems
    wrong, held = _keywords(tcot, item) if needs == "text_keywords" else _places(tcot, prompt, family)
    return wrong if level == "strict" or not held else []


def rule_of(problem: str) -> str:
    """A problem without the value found, to count by."""
    return problem.partition("; got ")[0].partition(" (and ")[0]


def _keywords(tcot: TCoT, item: Item) -> tuple[list[str], int]:
    """Problems of keywords, and how many there are in the text."""
    problems, text = Problems(), normalise_text(f"{item.instruction} {item.text}")
    missing = [keyword for keyword in tcot.text_keywords if normalise_text(keyword) not in text]
    for keyword in missing:
        problems.add("a text keyword must occur in the text", keyword)
    return list(problems.lines()), len(tcot.text_keywords) - len(missing)


def _places(tcot: TCoT, prompt: Prompt, family: Family) -> tuple[list[str], int]:
    """Problems of boxes or key frames, and how many pieces can be cut."""
    problems, units = Problems(), BOX_UNITS[box_convention(family)]
    for box in tcot.boxes if prompt.seen_sizes else ():
        width, height = units.of(prompt.seen_sizes[box.image - 1])
        places = [box.x1 / width, box.x2 / width, box.y1 / height, box.y2 / height]
        if min(places) < -OVERSHOOT or max(places) > 1 + OVERSHOOT:
            problems.add("a box must lie inside its image", (box.x1, box.y1, box.x2, box.y2))
    stand_ins: list[Any] = [_Size(size) for size in prompt.original_sizes]
    frames: list[Any] = [_Size((16, 16))] * prompt.num_frames
    try:
        evidence = cut_evidence(tcot, images=stand_ins, frames=frames, family=family, resized_sizes=prompt.seen_sizes)
    except DataError as error:  # a size that no image has
        return [*problems.lines(), str(error)], 0
    return [*problems.lines(), *evidence.problems], len(evidence.images)


@dataclass(frozen=True)
class _Size:
    """What cutting looks at of an image. Pixels would stop the event loop: 30 ms for a box in 12 million of them."""

    size: tuple[int, int]

    def crop(self, box: object) -> _Size:
        return self
