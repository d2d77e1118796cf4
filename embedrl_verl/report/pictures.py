# SPDX-License-Identifier: Apache-2.0
"""Pictures inside the page: scaled down, encoded into data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

QUALITY = 82
MAX_PNG_PIXELS = 256 * 256
"""Up to here PNG is tried too: small pictures and flat drawings are exact and often smaller in it."""
PNG_GAIN = 1.5
"""PNG is taken up to this multiple of JPEG's bytes, since it loses nothing."""
MAX_ENLARGED = 3.0


@dataclass
class Budget:
    """Bytes for pictures.

    Attributes:
        left: bytes that may still be spent.
        refused: pictures that did not fit.
    """

    left: int
    refused: int = 0

    def take(self, count: int) -> bool:
        """Spend the bytes of a picture if they fit; else count it as refused."""
        if count > self.left:
            self.refused += 1
            return False
        self.left -= count
        return True


@dataclass
class PictureBook:
    """Makes data URIs.

    Attributes:
        budget: what its pictures may cost.
        max_side: longest side of a picture in the file, in pixels; the browser scales what is shown.
    """

    budget: Budget
    max_side: int = 640

    def data_uri(self, image: Image.Image, max_side: int | None = None) -> str | None:
        """The picture, scaled down to `max_side` at most; None if the budget does not allow it."""
        uri = encode(image, min(max_side or self.max_side, self.max_side))
        return uri if self.budget.take(len(uri)) else None


def encode(image: Image.Image, max_side: int) -> str:
    """An RGB picture as data URI with no side over `max_side` pixels; never enlarged."""
    width, height = scaled_to(image.size, max_side)
    small = image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)
    jpeg = _bytes(small, "JPEG", quality=QUALITY, optimize=True)
    if width * height <= MAX_PNG_PIXELS:
        png = _bytes(small, "PNG", optimize=True)
        if len(png) <= PNG_GAIN * len(jpeg):
            return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def scaled_to(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) scaled down so that the longer side is `max_side` at most; each at least 1."""
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shown_at(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) in CSS pixels that fits into a frame; small pictures are enlarged, three times at most."""
    scale = min(width / size[0], height / size[1], MAX_ENLARGED)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _bytes(image: Image.Image, form: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
