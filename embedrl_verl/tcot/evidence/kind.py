# SPDX-License-Identifier: Apache-2.0
"""What a kind of evidence is: how a prompt asks for it, how it is read from a T-CoT's JSON, and what is cut for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedrl_verl.families import BoxConvention
from embedrl_verl.tcot.json_objects import JsonObject
from embedrl_verl.tcot.problems import Problems

if TYPE_CHECKING:
    from PIL import Image

Piece: TypeAlias = "Callable[[], Image.Image]"


@dataclass(frozen=True)
class InputSize:
    """Frames and images of the input; None = not known, then there is no upper bound."""

    frames: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Originals:
    """The media that evidence is cut from, and the limits of a crop; see `cut_evidence`."""

    images: Sequence[Image.Image]
    frames: Sequence[Image.Image]
    convention: BoxConvention
    seen_sizes: Sequence[tuple[int, int]]
    min_side: int
    max_aspect: float


def _same(plain: Any) -> Any:
    return plain


def _nothing(pointers: Sequence[Any], originals: Originals, problems: Problems) -> Sequence[Piece]:
    return ()


@dataclass(frozen=True)
class EvidenceKind:
    """One kind of evidence.

    Attributes:
        key: its key in the JSON object.
        medium: what an input must have to be pointed at.
        ask: by prompt style, the jinja2 text that asks for it; may use `units` (the family's `BoxUnits`),
            `num_images` and `num_frames`.
        read: the valid pointers of one JSON object; breaches of rules go to the `Problems`.
        cut: for each different place that can be cut, in order, what makes the piece; places that cannot go to the
            `Problems`. Evidence in a text has no pieces.
        restore: a pointer from its plain form (`TCoT.to_plain`).
        shown: a pointer as JSON, for the dump of a rollout.
    """

    key: str
    medium: Literal["text", "an image", "frames"]
    ask: Mapping[str, str]
    read: Callable[[JsonObject, InputSize, Problems], Iterable[Any]]
    cut: Callable[[Sequence[Any], Originals, Problems], Sequence[Piece]] = _nothing
    restore: Callable[[Any], Any] = _same
    shown: Callable[[Any], Any] = _same


def values_of(found: JsonObject, key: str, problems: Problems) -> Iterator[Any]:
    """The values under a key, which may be written twice; an empty list points at nothing and is a problem."""
    for value in found.values_of(key):
        if value == []:
            problems.add(f"{key} must not be empty")
        else:
            yield value


def items_of(found: JsonObject, key: str, problems: Problems) -> Iterator[Any]:
    """Items of the lists under a key; a value that is no list is a problem, and read as an item."""
    for value in values_of(found, key, problems):
        if isinstance(value, list) and not isinstance(value, JsonObject):
            yield from value
        else:
            problems.add(f"{key} must be a list", value)
            yield value
