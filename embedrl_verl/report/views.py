# SPDX-License-Identifier: Apache-2.0
"""What a card shows, as values: no reading and no HTML here.

A side may have several T-CoTs (before and after training, say); their boxes are drawn in the same picture, and `prefix`
tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, InputKind
from embedrl_verl.tcot import TCoT

if TYPE_CHECKING:
    from PIL import Image

    from embedrl_verl.data.media import LoadedItem
    from embedrl_verl.tcot.evidence.boxes import PixelBox

Facts = tuple[tuple[str, str], ...]

FLAG_LABELS = {
    "unreadable": "unreadable row",
    "media": "media missing or broken",
    "no_tcot": "one side has no T-CoT",
    "form": "T-CoT not well formed",
    "no_evidence": "evidence missing",
    "lost_box": "box without area or image",
    "tiny_box": "box too small or thin",
    "units": "box in other units?",
    "too_long": "too long",
    "too_much": "more evidence than is read",
    "keyword": "keyword not in the text",
    "whole_image": "box holds the whole image",
}
NOTES = frozenset({"too_much", "keyword", "whole_image"})
"""Flags worth a look that are no fault by themselves."""


@dataclass(frozen=True)
class Flag:
    """Something to look at. `code` is a key of `FLAG_LABELS`; `detail` says what was found, in a sentence."""

    code: str
    detail: str = ""

    @property
    def label(self) -> str:
        """Short name for a badge."""
        return FLAG_LABELS[self.code]

    @property
    def is_note(self) -> bool:
        """Whether it is worth a look, but no fault."""
        return self.code in NOTES


@dataclass(frozen=True)
class BoxView:
    """One box of a T-CoT.

    Attributes:
        name: number in the T-CoT, counted from 1, with the T-CoT's prefix.
        colour: number of its colour, any integer from 0.
        written: the four numbers as written, and `image`, counted from 1.
        pixels: in the original; None if it has no area there.
        label: what the T-CoT calls it, "" if nothing.
        status: "" if it is cut as evidence, else why it is not.
    """

    name: str
    colour: int
    written: tuple[float, float, float, float]
    image: int
    pixels: PixelBox | None
    label: str = ""
    status: str = ""


@dataclass(frozen=True)
class PieceView:
    """A piece of evidence as it is cut, and (width, height) in pixels at which the Embedder reads it."""

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
    """One side of a pair, or a negative.

    Attributes:
        title: "Query", "Target", "Negative 1".
        item: decoded originals; None if they cannot be decoded.
        text, instruction: shown also without `item`.
        media_note: what the stored media are, such as "8 of 64 frames".
    """

    title: str
    kind: InputKind | None
    text: str
    instruction: str
    item: LoadedItem | None
    tcots: tuple[TcotView, ...] = ()
    media_note: str = ""
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()

    @property
    def required(self) -> str | None:
        """Evidence key that the side's kind calls for."""
        return None if self.kind is None else EVIDENCE_KEY_OF_KIND[self.kind]


@dataclass(frozen=True)
class CardView:
    """One record. `where` names file and row; `flags` are those of no side."""

    title: str
    source: str
    where: str
    sides: tuple[SideView, ...] = ()
    more: tuple[SideView, ...] = ()
    facts: Facts = ()
    flags: tuple[Flag, ...] = ()

    def all_flags(self) -> tuple[Flag, ...]:
        """Flags of the record, its sides, negatives and T-CoTs, one of each code."""
        sides = [*self.sides, *self.more]
        found = [*self.flags, *(flag for side in sides for flag in side.flags)]
        found += [flag for side in sides for tcot in side.tcots for flag in tcot.flags]
        return tuple({flag.code: flag for flag in reversed(found)}.values())[::-1]

    @property
    def has_problem(self) -> bool:
        """Whether any flag is a fault."""
        return any(not flag.is_note for flag in self.all_flags())
