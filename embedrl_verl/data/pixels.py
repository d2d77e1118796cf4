# SPDX-License-Identifier: Apache-2.0
"""Pixels of any kind as a person sees them: 8-bit RGB, what is transparent on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from embedrl_verl.errors import MediaError

BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF."""
KEY_SCALES = {"L;2": 85, "L;4": 17}
"""Grey PNGs of few bits: Pillow scales their pixels to 8 bits, but not the colour that stands for transparency."""


def decode_rgb(image: Image.Image) -> Image.Image:
    """Pixels of a file that has been opened (not loaded), turned as its EXIF orientation says.

    Pixels without a known range (floating point, signed, 32 bits a sample) are refused, and a 16-bit RGB PNG with a
    colour that stands for transparency, which Pillow cannot tell from its neighbours.
    """
    top, is_inverted, key = 65535, False, image.info.get("transparency")
    if image.format == "PNG" and key is not None:
        layout = image.tile[0][3]  # type: ignore[attr-defined]
        if layout == "RGB;16B":
            raise MediaError("a 16-bit RGB PNG with a transparent colour is not supported; save with an alpha channel")
        if layout in KEY_SCALES:
            key *= KEY_SCALES[layout]
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if 2 in tags.get(SAMPLE_FORMAT, ()) or image.mode == "I":
            raise MediaError("signed pixels and those of 32 bits have no known range; save with 8 or 16 bits")
        top = (1 << tags.get(BITS, (16,))[0]) - 1
        is_inverted = tags.get(PHOTOMETRIC) == 0  # white is 0: Pillow heeds it for 8 bits and less
    image.load()
    turned = ImageOps.exif_transpose(image)
    if key is not None:
        turned.info["transparency"] = key
    return _grey16_to_rgb(turned, top, is_inverted) if turned.mode.startswith("I") else to_rgb(turned)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy: transparency over white (also a colour that stands for it), 16-bit grey scaled to 8 bits; an RGB image
    without any is returned as it is.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise MediaError("floating point pixels have no known range; save with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image, top: int = 65535, is_inverted: bool = False) -> Image.Image:
    """Of values 0..`top`, the largest white (`is_inverted`: black)."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > top:
        raise MediaError(f"grey pixels must be 0..{top}; got {values.min()}..{values.max()}; save with 8 or 16 bits")
    grey = (values.astype(np.uint32) * 255 // top).astype(np.uint8)
    if is_inverted:
        grey = 255 - grey
    key = image.info.get("transparency")
    return Image.fromarray(grey if key is None else np.where(values == key, np.uint8(255), grey)).convert("RGB")
