# SPDX-License-Identifier: Apache-2.0
"""Pictures and T-CoTs that the report tests share, and what an HTML parser makes of a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

MEAN_TEXT = '</p><script>window.owned = 1</script>"\'><img src=x onerror=alert(1)> & {"a": 1}'


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Random pixels, so that no two places of a picture are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """Encoded without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tcot(evidence: Any, thinking: str = "It matters.", answer: str = "Done.") -> str:
    """A well-formed T-CoT with this evidence."""
    return f"<thinking>{thinking} {json.dumps(evidence)}</thinking><rethink>Right.</rethink><answer>{answer}</answer>"


class Seen(HTMLParser):
    """The elements of a text with their attributes, the characters outside of programs, and unbalanced tags."""

    VOID = ("img", "br", "meta", "input", "hr", "link")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.characters = ""
        self.programs: dict[str, str] = {}
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        if not self._open or self._open.pop() != name:
            self.unbalanced.append(name)

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.programs[self._open[-1]] = self.programs.get(self._open[-1], "") + text
        else:
            self.characters += text

    def all(self, name: str, class_: str | None = None) -> list[dict[str, str | None]]:
        """Attributes of the elements of a name, and of a class if given."""
        found = [attributes for element, attributes in self.elements if element == name]
        return [one for one in found if class_ is None or class_ in (one.get("class") or "").split()]
