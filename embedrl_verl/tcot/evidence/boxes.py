# SPDX-License-Identifier: Apache-2.0
"""Boxes in images: how they are written, and the only place that brings them from a family's units to pixels.

Strict forms (anything else readable is read, and is a problem):

    "bbox_2d": [228, 320, 961, 970]                     one box, of four finite numbers
    "bbox_2d": [[228, 320, 961, 970], [0, 0, 9, 9]]     several boxes
    "bbox_2d": [{"image": 2, "box": [228, 320, 961, 970], "label": "bus"}]
                                                        boxes that name their image, counted from 1; alone or in a list;
                                                        the box, or a list of boxes, under a key of `BOX_KEYS`; other
                                                        keys are ignored
    {"image": 2, "bbox_2d": [228, 320, 961, 970]}       the image of all boxes in the object

A box that names no image lies in image 1. Corners in the wrong order or outside the image are no matter of form; such
boxes fall away when pixels are cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import BOX_CONVENTIONS, BOX_UNITS, BoxConvention
from embedrl_verl.tcot.evidence.kind import EvidenceKind, InputSize, Originals, Piece, values_of
from embedrl_verl.tcot.json_objects import JsonObject
from embedrl_verl.tcot.problems import Problems

EXAMPLE_SIZE = 1000
"""Width and height of every image in worked examples."""
BOX_KEYS = ("box", "bbox", "bbox_2d")

PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle as the Reasoner wrote it.

    Attributes:
        x1, y1: upper left corner, in the units of the Reasoner's family: 0..1000 relative to width and height, or
            pixels of the image as resized for the model. Not clamped: a policy may write anything finite.
        x2, y2: lower right corner.
        image: which image of the input, counted from 1.
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


def boxes_to_pixels(
    boxes: Sequence[Box | Sequence[float]],
    *,
    convention: BoxConvention,
    width: int,
    height: int,
    resized_width: int | None = None,
    resized_height: int | None = None,
) -> list[PixelBox]:
    """Boxes of one image in pixels of the original.

    Relative: pixel = value / 1000 * size. Absolute: the Reasoner saw the image resized, pixel = value * original /
    resized. Both are clamped to the image, then cut to whole pixels, as Qwen's own decoding does (one pixel of loss is
    normal).

    Args:
        boxes: `Box`es (whose `image` plays no part here) or sequences x1, y1, x2, y2.
        convention: "relative_1000" or "absolute".
        width, height: size of the original in pixels.
        resized_width, resized_height: "absolute" only: size in pixels at which the Reasoner saw the image. None = it
            saw the original.

    Returns:
        (x1, y1, x2, y2) with 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, x2 and y2 exclusive. A box that has no
        area (corners in the wrong order, outside the image, thinner than a pixel) is dropped.
    """
    if convention not in BOX_CONVENTIONS:
        raise ConfigError(f"convention must be one of {', '.join(BOX_CONVENTIONS)}; got {convention!r}")
    seen = (width if resized_width is None else resized_width, height if resized_height is None else resized_height)
    units = BOX_UNITS[convention].of(seen)
    if min(width, height, *units) < 1:
        raise DataError(f"sizes must be at least 1 px; got original {width}x{height}, resized {units[0]}x{units[1]}")

    pixels = []
    for box in boxes:
        if not isinstance(box, Box):
            if len(box) != 4:
                raise DataError(f"a box must have four numbers; got {box!r}")
            box = Box(box[0], box[1], box[2], box[3])
        x1, x2 = (_to_pixel(value, width, units[0]) for value in (box.x1, box.x2))
        y1, y2 = (_to_pixel(value, height, units[1]) for value in (box.y1, box.y2))
        if x1 < x2 and y1 < y2:
            pixels.append((x1, y1, x2, y2))
    return pixels


def _to_pixel(value: float, size: int, unit: int) -> int:
    # Multiply first: exact for whole values, where value / 1000 * size may end just under the pixel.
    return int(min(max(value * size / unit, 0), size))


def _read(found: JsonObject, size: InputSize, problems: Problems) -> Iterator[Box]:
    image = _image_of(found, 1, problems) if found.values_of("bbox_2d") else None
    for value in values_of(found, "bbox_2d", problems):
        if image is not None:
            yield from _boxes_in(value, image, size, problems)


def _boxes_in(value: Any, image: int, size: InputSize, problems: Problems, level: int = 0) -> Iterator[Box]:
    """Boxes of a value; `level` lists are open. Depth is bounded by the JSON's."""
    if isinstance(value, JsonObject):
        inner = _image_of(value, image, problems)
        boxes = [box for key, box in value if key in BOX_KEYS]
        if not boxes:
            problems.add(f"a box object must have one of {', '.join(BOX_KEYS)}", value)
        for box in boxes if inner is not None else ():
            yield from _boxes_in(box, inner or image, size, problems)
    elif isinstance(value, list) and any(isinstance(item, list) for item in value):
        if level:
            problems.add("boxes must be one flat list of boxes, without lists in between", value)
        for item in value:
            yield from _boxes_in(item, image, size, problems, level + 1)
    elif not (isinstance(value, list) and len(value) == 4 and all(_is_finite(number) for number in value)):
        problems.add("a box must have four finite numbers", value)
    elif size.images is not None and image > size.images:
        problems.add(f"a box's image must not be above the number of images, {size.images}", image)
    else:
        x1, y1, x2, y2 = map(float, value)
        yield Box(x1, y1, x2, y2, image)


def _image_of(found: JsonObject, outer: int, problems: Problems) -> int | None:
    """The image that an object names, else `outer`; None if what it names is no image."""
    named = found.values_of("image")
    if not named:
        return outer
    if any(image != named[0] for image in named):
        problems.add("a box object must name one image", named)
    elif type(named[0]) is not int or named[0] < 1:
        problems.add("a box's image must be an integer from 1", named[0])
    else:
        return named[0]
    return None


def _is_finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _cut(boxes: Sequence[Box], originals: Originals, problems: Problems) -> Sequence[Piece]:
    places: dict[tuple[int, PixelBox], None] = {}
    for box in boxes:
        if box.image > len(originals.images):
            problems.add(f"a box's image must not be above the number of images, {len(originals.images)}", box.image)
            continue
        size, seen = originals.images[box.image - 1].size, originals.seen_sizes[box.image - 1]
        found = boxes_to_pixels(
            [box],
            convention=originals.convention,
            width=size[0],
            height=size[1],
            resized_width=seen[0],
            resized_height=seen[1],
        )
        if not found:
            problems.add("a box must have an area inside its image", (box.x1, box.y1, box.x2, box.y2))
            continue
        (pixels,) = found
        short, long = sorted((pixels[2] - pixels[0], pixels[3] - pixels[1]))
        if short < originals.min_side:
            problems.add(f"a crop's sides must be at least {originals.min_side} px", pixels)
        elif long > originals.max_aspect * short:
            problems.add(f"a crop's sides may differ by a factor of {originals.max_aspect:g} at most", pixels)
        else:
            places[box.image, pixels] = None
    return [partial(originals.images[image - 1].crop, pixels) for image, pixels in places]


def example_box(corners: Sequence[int], size: tuple[int, int], convention: BoxConvention) -> list[float]:
    """A box of a worked example, written in 0..1000, in a family's units; `size`: (width, height) of its image."""
    units = BOX_UNITS[convention]
    return [
        round(value / EXAMPLE_SIZE * side, units.digits or None)
        for value, side in zip(corners, units.of(size) * 2, strict=True)
    ]


BOXES = EvidenceKind(
    key="bbox_2d",
    medium="an image",
    ask={
        "paper": 'Point at the evidence in the image: a JSON object with the key "bbox_2d", a list of boxes '
        "[x1, y1, x2, y2] around the regions that decide a match, upper left corner first. Coordinates are "
        "{{ units.prompt }}. "
        "The number of images is {{ num_images }}. If there are several, let each box name its image, counted from 1: "
        '{"bbox_2d": [{"image": 2, "box": [x1, y1, x2, y2]}]}.',
        "compact": "bbox_2d {{ units.compact }}",
    },
    read=_read,
    cut=_cut,
    restore=lambda plain: Box(**plain),
    shown=lambda box: [box.x1, box.y1, box.x2, box.y2, box.image],
)
