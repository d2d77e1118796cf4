# SPDX-License-Identifier: Apache-2.0
"""Images as data: URLs, for servers that cannot read the run's files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from embedrl_verl.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

# Below this many pixels PNG costs little and loses nothing.
_SMALL = 128 * 128


def image_urls(images: Iterable[Image.Image], *, max_side: int = 768) -> list[str]:
    """Encode images as RGB, shrunk so that no side is above `max_side` pixels; PNG if small, else JPEG.

    Takes milliseconds an image: call it once a prompt, outside of an event loop.

    Raises:
        ConfigError: max_side is below 1.
    """
    if max_side < 1:
        raise ConfigError(f"max_side must be 1 pixel or more; got {max_side}")
    return [_url(image, max_side) for image in images]


def _url(image: Image.Image, max_side: int) -> str:
    shown = image.convert("RGB")  # a copy, so that the caller's image keeps its size
    if max(shown.size) > max_side:
        shown.thumbnail((max_side, max_side))
    kind = "png" if shown.width * shown.height <= _SMALL else "jpeg"
    buffer = io.BytesIO()
    shown.save(buffer, format=kind, **({"quality": 92} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
