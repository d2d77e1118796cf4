# SPDX-License-Identifier: Apache-2.0
"""A T-CoT and the boxes in it, as values.

A T-CoT reads `<thinking>` reasoning with one JSON object of evidence `</thinking>` `<rethink>` a check `</rethink>`
`<answer>` a short answer `</answer>`. Evidence points at the input: words of a text, boxes in images, frames of a clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.kinds import EVIDENCE_KEYS

THINKING_END = "</thinking>"


@dataclass(frozen=True)
class Box:
    """A rectangle as the Reasoner wrote it.

    Attributes:
        x1, y1: upper left corner, in the units of the Reasoner's family: 0..1000 relative to width and height, or
            pixels of the image as resized for the model. Not clamped: a policy may write anything finite.
        x2, y2: lower right corner.
        image: which image of the input, counted from 1.

    Raises:
        DataError: a coordinate is not finite, or `image` is below 1.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 1

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.x1, self.y1, self.x2, self.y2)):
            raise DataError(f"a box must have four finite numbers; got {(self.x1, self.y1, self.x2, self.y2)}")
        if self.image < 1:
            raise DataError(f"a box's image is counted from 1; got {self.image}")


@dataclass(frozen=True)
class TCoT:
    """What could be read of a T-CoT; `parse_tcot` makes it.

    Attributes:
        text: the raw text, untouched.
        thinking, rethink, answer: contents of the three parts without tags and outer white space; "" = not found.
        text_keywords: the strings of evidence key `text_keywords`.
        boxes: the boxes of evidence key `bbox_2d`, in the order in which they were written.
        key_frames: the frame numbers of evidence key `key_frames`, counted from 1, as written (also twice).
        problems: what is wrong, one line a rule; () if well formed.
    """

    text: str
    thinking: str = ""
    rethink: str = ""
    answer: str = ""
    text_keywords: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    key_frames: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_well_formed(self) -> bool:
        """Three parts in order, none empty, nothing outside; one JSON object, in `<thinking>`; valid evidence only."""
        return not self.problems

    def has_evidence(self, key: str) -> bool:
        """Whether anything valid was read under an evidence key.

        Raises:
            ConfigError: not an evidence key.
        """
        if key not in EVIDENCE_KEYS:
            raise ConfigError(f"evidence key must be one of {', '.join(EVIDENCE_KEYS)}; got {key!r}")
        return bool({"text_keywords": self.text_keywords, "bbox_2d": self.boxes, "key_frames": self.key_frames}[key])

    def sections(self) -> tuple[str, str]:
        """The raw text cut after its first `</thinking>`; the two parts joined are the text, character by character.

        Without `</thinking>` all of the text is the first part. Evidence crops belong between the two.
        """
        thinking, tag, rest = self.text.partition(THINKING_END)
        return thinking + tag, rest
