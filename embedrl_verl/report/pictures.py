# SPDX-License-Identifier: Apache-2.0
"""Pictures inside the page: scaled down and encoded into data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

QUALITY = 82
MAX_PNG_PIXELS = 128 * 128
"""Up to here PNG costs little, and loses nothing."""
MAX_ENLARGED = 3.0


def encode(image: Image.Image, max_side: int) -> str:
    """An RGB picture as data URI with no side over `max_side` pixels; never enlarged."""
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    form = "png" if small.width * small.height <= MAX_PNG_PIXELS else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, form, quality=QUALITY, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_at(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in CSS pixels that fits into a frame; small pictures are enlarged, three times at most."""
    scale = min(frame[0] / size[0], frame[1] / size[1], MAX_ENLARGED)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
