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
    """Something to look at. `code` is a key of `FAULTS` or `NOTES`; `detail` says what was found, in a sentence."""

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
    """One box of a T-CoT.

    Attributes:
        name: number in the T-CoT, counted from 1, with the T-CoT's prefix.
        colour: any number from 0.
        image: counted from 1.
        pixels: in the original; None if it has no area there.
        status: "" if it is cut as evidence, else why it is not.
    """

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
    """A T-CoT with what it points at; `prefix` stands before the names of its boxes and key frames."""

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
    """One record. `where` names file and row; `more` are its hard negatives; `flags` are those of no side."""

    title: str
    source: str
    where: str
    sides: tuple[SideView, ...] = ()
    more: tuple[SideView, ...] = ()
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()

    def all_flags(self) -> tuple[Flag, ...]:
        """Of the record, its sides, negatives and T-CoTs, one of each code."""
        sides = (*self.sides, *self.more)
        parts = (self, *sides, *(view for side in sides for view in side.tcots))
        found: dict[str, Flag] = {}
        for flag in (flag for part in parts for flag in part.flags):
            found.setdefault(flag.code, flag)
        return tuple(found.values())

    @property
    def has_fault(self) -> bool:
        return any(not flag.is_note for flag in self.all_flags())
