# SPDX-License-Identifier: Apache-2.0
"""A file of records that the report tests share, and what an HTML parser makes of a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Random pixels, so that no two places of a picture are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tcot(evidence: Any, words: str = "It matters.") -> str:
    return f"<thinking>{words} {json.dumps(evidence)}</thinking><rethink>{words}</rethink><answer>{words}</answer>"


class Seen(HTMLParser):
    """What is in a page; `open`: tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.characters, self.open = "", list[str]()
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
        found = [one for element, one in self.elements if element == name]
        return [one for one in found if not class_ or class_ in one.get("class", "").split()]


@pytest.fixture
def records() -> list[PairRecord]:
    """Images, a page and a clip, sound ones; then one with words for a T-CoT, a broken and a bare one."""
    picture, page = png(noise(0, 400, 200)), png(noise(1, 300, 424))
    frames = tuple(png(noise(10 + number, 56, 56)) for number in range(4))
    answer = Item("a red bus", tcot=tcot({"text_keywords": ["red bus"]}))
    boxes = tcot({"bbox_2d": [[100, 200, 500, 800], [600, 0, 1000, 500]]})
    sides = {
        ("image", "vqa"): (Item("what drives?", (picture,), tcot=boxes), answer),
        ("page", "docs"): (answer, Item("", (page,), kind="page", tcot=tcot({"bbox_2d": [0, 0, 1000, 100]}))),
        ("clip", "videos"): (Item(video=Video(frames, fps=2.0), tcot=tcot({"key_frames": [4, 2]})), answer),
        ("words", "odd"): (Item("a question", tcot="words"), answer),
        ("broken", "vqa"): (Item("where?", ("gone.png",)), answer),
        ("bare", "text"): (Item("a question"), Item("an answer")),
    }
    return [PairRecord(*names, "Find it.", *pair, "id", (Item("a car"),)) for names, pair in sides.items()]


@pytest.fixture
def file(tmp_path: Path, records: list[PairRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    """The records in pairs.parquet, in the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    write_pairs(records, "pairs.parquet")
