# SPDX-License-Identifier: Apache-2.0
"""What a card shows, as values: no reading and no HTML here.

A side may have several T-CoTs (before and after training, say); their boxes are drawn in the same picture, and `prefix`
tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from embedrl_verl.data.media import LoadedItem
from embedrl_verl.kinds import InputKind
from embedrl_verl.tcot import TCoT
from embedrl_verl.tcot.evidence.boxes import PixelBox

Facts = tuple[tuple[str, str], ...]

FAULTS = {
    "unreadable": "unreadable row",
    "media": "media missing or broken",
    "no_tcot": "one side has no T-CoT",
    "form": "T-CoT not well formed",
    "no_evidence": "evidence missing",
    "lost_box": "box without area or image",
    "tiny_box": "box too small or thin",
    "units": "box in other units?",
    "too_long": "too long",
}
NOTES = {
    "too_much": "more evidence than is read",
    "keyword": "keyword not in the text",
    "whole_image": "box holds the whole image",
}
"""Worth a look, but no fault by themselves."""


@dataclass(frozen=True)
class Flag:
    """Something to look at: a key of `FAULTS` or `NOTES`, and a sentence that says what was found."""

    code: str
    detail: str = ""

    @property
    def label(self) -> str:
        return FAULTS.get(self.code) or NOTES[self.code]

    @property
    def is_note(self) -> bool:
        return self.code in NOTES


@dataclass(frozen=True)
class BoxView:
    """One box of a T-CoT: its number there, from 1, after the T-CoT's prefix; the numbers as written, and the image,
    from 1; its pixels in the original, if it has an area there; and why it is not cut as evidence, "" if it is."""

    name: str
    colour: int
    written: tuple[float, float, float, float]
    image: int
    pixels: PixelBox | None
    status: str = ""


@dataclass(frozen=True)
class PieceView:
    """A piece of evidence as it is cut, and (width, height) at which the Embedder reads it; frames have no colour."""

    name: str
    colour: int | None
    image: Image.Image
    read_at: tuple[int, int]


@dataclass(frozen=True)
class TcotView:
    """A T-CoT with what it points at."""

    title: str
    tcot: TCoT
    boxes: tuple[BoxView, ...] = ()
    pieces: tuple[PieceView, ...] = ()
    missing_keywords: tuple[str, ...] = ()
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class SideView:
    """One side of a pair, or a negative. `item` has the decoded originals; None if they cannot be decoded."""

    title: str
    kind: InputKind | None
    text: str
    instruction: str
    item: LoadedItem | None
    tcots: tuple[TcotView, ...] = ()
    media_note: str = ""
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class CardView:
    """One record; `more` are its hard negatives, `heading` stands above the card."""

    title: str
    source: str
    where: str
    sides: tuple[SideView, ...] = ()
    more: tuple[SideView, ...] = ()
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()
    heading: str = ""

    def all_flags(self) -> tuple[Flag, ...]:
        """Of the record, its sides, negatives and T-CoTs, one of each code."""
        sides = (*self.sides, *self.more)
        flags = [*self.flags, *(flag for side in sides for flag in side.flags)]
        flags += [flag for side in sides for view in side.tcots for flag in view.flags]
        return tuple({flag.code: flag for flag in reversed(flags)}.values())[::-1]

    @property
    def has_fault(self) -> bool:
        return any(not flag.is_note for flag in self.all_flags())
