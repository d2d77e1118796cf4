# SPDX-License-Identifier: Apache-2.0
"""Boxes from the units of a Reasoner's family to pixels of the original image. The only place that converts them.

Relative: pixel = value / 1000 * size. Absolute: the Reasoner saw the image resized, pixel = value * original / resized.
Both are clamped to the image and then cut to whole pixels, as Qwen's own decoding does (one pixel of loss is normal).
"""

from __future__ import annotations

from collections.abc import Sequence

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import BOX_CONVENTIONS, BoxConvention
from embedrl_verl.tcot.schema import Box

RELATIVE_SIZE = 1000
"""Width and height of every image in the relative convention."""

PixelBox = tuple[int, int, int, int]


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

    Args:
        boxes: `Box`es (whose `image` plays no part here) or sequences x1, y1, x2, y2.
        convention: "relative_1000" or "absolute".
        width, height: size of the original in pixels.
        resized_width, resized_height: "absolute" only: size in pixels at which the Reasoner saw the image. None = it
            saw the original.

    Returns:
        (x1, y1, x2, y2) with 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, x2 and y2 exclusive. A box that has no
        area (corners in the wrong order, outside the image, thinner than a pixel) is dropped.

    Raises:
        ConfigError: an unknown convention.
        DataError: a size below 1, or a box that is not four finite numbers.
    """
    if convention not in BOX_CONVENTIONS:
        raise ConfigError(f"convention must be one of {', '.join(BOX_CONVENTIONS)}; got {convention!r}")
    if convention == "relative_1000":
        units = (RELATIVE_SIZE, RELATIVE_SIZE)
    else:
        units = (
            width if resized_width is None else resized_width,
            height if resized_height is None else resized_height,
        )
    if min(width, height, *units) < 1:
        raise DataError(f"sizes must be at least 1 px; got original {width}x{height}, resized {units[0]}x{units[1]}")

    pixels = []
    for box in boxes:
        corners = box if isinstance(box, Box) else _box_of(box)
        x1, x2 = (_to_pixel(value, width, units[0]) for value in (corners.x1, corners.x2))
        y1, y2 = (_to_pixel(value, height, units[1]) for value in (corners.y1, corners.y2))
        if x1 < x2 and y1 < y2:
            pixels.append((x1, y1, x2, y2))
    return pixels


def _box_of(values: Sequence[float]) -> Box:
    if len(values) != 4:
        raise DataError(f"a box must have four numbers; got {values!r}")
    x1, y1, x2, y2 = values
    return Box(x1, y1, x2, y2)


def _to_pixel(value: float, size: int, unit: int) -> int:
    # Multiply first: exact for whole values, where value / 1000 * size may end just under the pixel.
    return int(min(max(value * size / unit, 0), size))
