# SPDX-License-Identifier: Apache-2.0
"""A file of records that the report tests share, and what an HTML parser makes of a page."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs


def noise(seed, width, height):
    """Random pixels, so that no two places of a picture are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tcot(evidence, words="It matters."):
    return f"<thinking>{words} {json.dumps(evidence)}</thinking><rethink>{words}</rethink><answer>{words}</answer>"


class Seen(HTMLParser):
    """What is in a page: elements with their attributes, and all text; every tag must be closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.characters, self.open = [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        self.open += [name] if name not in ("img", "meta", "input") else []

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.characters += text

    def all(self, name, class_=""):
        found = [one for element, one in self.elements if element == name]
        return [one for one in found if not class_ or class_ in one.get("class", "").split()]


PICTURE, PAGE = png(noise(0, 400, 200)), png(noise(1, 300, 424))
CLIP = Video(tuple(png(noise(10 + number, 56, 56)) for number in range(4)), fps=2.0)
ANSWER = Item("a red bus", tcot=tcot({"text_keywords": ["red bus"]}))
BOXES = tcot({"bbox_2d": [[100, 200, 500, 800], [600, 0, 1000, 500]]})
SIDES = {
    ("image", "vqa"): (Item("what drives?", (PICTURE,), tcot=BOXES), ANSWER),
    ("page", "docs"): (ANSWER, Item("", (PAGE,), kind="page", tcot=tcot({"bbox_2d": [0, 0, 1000, 100]}))),
    ("clip", "videos"): (Item(video=CLIP, tcot=tcot({"key_frames": [4, 2]})), ANSWER),
    ("words", "odd"): (Item("a question", tcot="words"), ANSWER),
    ("broken", "vqa"): (Item("where?", ("gone.png",)), ANSWER),
    ("bare", "text"): (Item("a question"), Item("an answer")),
}
RECORDS = [PairRecord(*names, "Find it.", *sides, "id", (Item("a car"),)) for names, sides in SIDES.items()]
"""Images, a page and a clip, sound ones; then one with words for a T-CoT, a broken and a bare one."""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The records in pairs.parquet, in the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    write_pairs(RECORDS, "pairs.parquet")
