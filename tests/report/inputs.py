# SPDX-License-Identifier: Apache-2.0
"""Pictures and T-CoTs that the report tests share, and what an HTML parser makes of a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Random pixels, so that no two places of a picture are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tcot(evidence: Any, words: str = "It matters.") -> str:
    """A well-formed T-CoT with this evidence."""
    return f"<thinking>{words} {json.dumps(evidence)}</thinking><rethink>{words}</rethink><answer>{words}</answer>"


class Seen(HTMLParser):
    """The elements of a text with their attributes, its characters, and unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.characters = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        if name not in ("img", "meta", "input"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, text: str) -> None:
        self.characters += text

    def all(self, name: str, class_: str = "") -> list[dict[str, str]]:
        """Attributes of the elements of a name, and of a class if given."""
        found = [one for element, one in self.elements if element == name]
        return [one for one in found if not class_ or class_ in one.get("class", "").split()]
