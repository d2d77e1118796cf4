# SPDX-License-Identifier: Apache-2.0
"""Is a reply a T-CoT that can be used? Strict form, and evidence that points at something.

How much the evidence must hold:

| level | |
|---|---|
| off | the form alone: the key that the input calls for is there, with valid values |
| usable | at least one piece holds |
| strict | every piece holds |

A box holds if it lies in its image and can be cut as the Embedder will cut it, a key frame if the clip has it (the
parser sees to that), a keyword if it occurs in the side's text or instruction (case, width and white space aside). What
does not hold and is let through is a note, which is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from PIL import Image

from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.data.identity import normalise_text
from embedrl_verl.data.schema import Item
from embedrl_verl.errors import DataError
from embedrl_verl.families import BOX_UNITS, Family, box_convention
from embedrl_verl.tcot import TCoT, cut_evidence, parse_tcot

EvidenceLevel: TypeAlias = Literal["off", "usable", "strict"]
LEVELS: tuple[EvidenceLevel, ...] = get_args(EvidenceLevel)
OVERSHOOT = 0.01
"""Share of an image's side by which a box may lie outside: rounding, and families that count to 1000 or to 999."""
CUT_OFF = "the reply must end before the limit of tokens"


@dataclass(frozen=True)
class Checked:
    """`problems`: why a reply is refused, () if it is good. `notes`: evidence that does not hold, let through."""

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_tcot(
    text: str, *, item: Item, prompt: Prompt, required: str, family: Family, level: EvidenceLevel, cut_off: bool
) -> Checked:
    """Read a reply about an item (with its instruction) to a prompt (whose sizes of media count).

    Args:
        required: evidence key of the side's kind.
        cut_off: the server stopped at the limit of tokens.
    """
    images, frames = len(prompt.original_sizes), prompt.num_frames
    tcot = parse_tcot(text, num_frames=frames or None, num_images=images or None)
    problems = list(tcot.problems)
    if cut_off:
        problems.insert(0, CUT_OFF)
    if not tcot.has_evidence(required):
        problems.append(f"the JSON object must have the key {required} with at least one valid entry")
    if problems:
        return Checked(tuple(problems))
    if level == "off":
        return Checked(())
    wrong, held = _keywords(tcot, item) if required == "text_keywords" else _places(tcot, prompt, family, required)
    refused = wrong and (level == "strict" or not held)
    return Checked(tuple(wrong), ()) if refused else Checked((), tuple(wrong))


def rule_of(problem: str) -> str:
    """A problem without the value found, to count by."""
    return problem.partition("; got ")[0].partition(" (and ")[0]


def _keywords(tcot: TCoT, item: Item) -> tuple[list[str], int]:
    text = normalise_text(f"{item.instruction} {item.text}")
    missing = [keyword for keyword in tcot.text_keywords if normalise_text(keyword) not in text]
    wrong = [f"a text keyword must occur in the text; got {missing[0]!r}{_more(missing)}"] if missing else []
    return wrong, len(tcot.text_keywords) - len(missing)


def _places(tcot: TCoT, prompt: Prompt, family: Family, required: str) -> tuple[list[str], int]:
    """Problems of boxes or key frames, and how many pieces can be cut."""
    wrong: list[str] = []
    if required == "bbox_2d":
        units = BOX_UNITS[box_convention(family)]
        outside = []
        for box in tcot.boxes:
            width, height = units.of(prompt.seen_sizes[box.image - 1])
            low = min(box.x1 / width, box.x2 / width, box.y1 / height, box.y2 / height)
            high = max(box.x1 / width, box.x2 / width, box.y1 / height, box.y2 / height)
            if low < -OVERSHOOT or high > 1 + OVERSHOOT:
                outside.append((box.x1, box.y1, box.x2, box.y2))
        wrong += [f"a box must lie inside its image; got {outside[0]}{_more(outside)}"] if outside else []
    stand_ins = [Image.new("1", size) for size in prompt.original_sizes]
    frames = [Image.new("1", (16, 16))] * prompt.num_frames
    try:
        evidence = cut_evidence(tcot, images=stand_ins, frames=frames, family=family, resized_sizes=prompt.seen_sizes)
    except DataError as error:  # a size that no image has
        return [*wrong, str(error)], 0
    return [*wrong, *evidence.problems], len(evidence.images)


def _more(found: Sequence[object]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
