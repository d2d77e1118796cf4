# SPDX-License-Identifier: Apache-2.0
"""Evidence in a decoded JSON object: keywords, boxes and key frames, and what is wrong with them.

Strict forms of the values (anything else readable is read, and is a problem):

    "text_keywords": ["red bus", "stop"]            strings, none empty
    "key_frames": [1, 4]                            integers from 1, at most the number of frames where it is known
    "bbox_2d": [228, 320, 961, 970]                 one box, of four finite numbers
    "bbox_2d": [[228, 320, 961, 970], [0, 0, 9, 9]]     several boxes
    "bbox_2d": [{"image": 2, "box": [228, 320, 961, 970], "label": "bus"}]
                                                    boxes that name their image, counted from 1; alone or in a list; the
                                                    box, or a list of boxes, under `box`, `bbox` or `bbox_2d`; other
                                                    keys are ignored
    {"image": 2, "bbox_2d": [228, 320, 961, 970]}   the image of all boxes in the object

A box that names no image lies in image 1. An empty list is a problem: it points at nothing. Corners in the wrong order
or outside the image are no matter of form; such boxes fall away when pixels are cut.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from embedrl_verl.kinds import EVIDENCE_KEYS
from embedrl_verl.tcot.json_objects import JsonObject
from embedrl_verl.tcot.problems import Problems
from embedrl_verl.tcot.schema import Box

BOX_KEYS = ("box", "bbox", "bbox_2d")
_LIST_LEVELS = 1  # a list of boxes is strict; lists of lists of boxes are read, with a problem
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class EvidenceReader:
    """Collects the evidence of one T-CoT.

    Attributes:
        problems: where broken rules are recorded.
        num_frames, num_images: size of the input; None = not known, then there is no upper bound.
    """

    problems: Problems
    num_frames: int | None
    num_images: int | None
    text_keywords: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    key_frames: list[int] = field(default_factory=list)

    def read(self, found: JsonObject) -> None:
        """Read one object; a key that is written twice counts with all its values."""
        image = self._image_of(found, 1) if found.values_of("bbox_2d") else None
        for key, value in found:
            if key in EVIDENCE_KEYS and value in ([], {}):
                self.problems.add(f"{key} must not be empty")
            elif key == "text_keywords":
                self._read_keywords(value)
            elif key == "key_frames":
                self._read_frames(value)
            elif key == "bbox_2d" and image is not None:
                self._read_boxes(value, image, 0)

    def _read_keywords(self, value: Any) -> None:
        for keyword in self._items(value, "text_keywords must be a list"):
            if isinstance(keyword, str) and keyword.strip() and not _SURROGATE.search(keyword):
                self.text_keywords.append(keyword)
            else:
                self.problems.add("a text keyword must be a non-empty string of valid Unicode", keyword)

    def _read_frames(self, value: Any) -> None:
        for frame in self._items(value, "key_frames must be a list"):
            if type(frame) is not int:
                self.problems.add("a key frame must be an integer", frame)
            elif frame < 1:
                self.problems.add("key frames are counted from 1", frame)
            elif self.num_frames is not None and frame > self.num_frames:
                self.problems.add(f"key frames must not be above the number of frames, {self.num_frames}", frame)
            else:
                self.key_frames.append(frame)

    def _items(self, value: Any, rule: str) -> list[Any]:
        if isinstance(value, list) and not isinstance(value, JsonObject):
            return value
        self.problems.add(rule, value)
        return [value]

    def _read_boxes(self, value: Any, image: int, level: int) -> None:
        """Boxes of a value; `level` lists are open. Depth is bounded by the JSON's."""
        if isinstance(value, JsonObject):
            inner = self._image_of(value, image)
            boxes = [box for key, box in value if key in BOX_KEYS]
            if not boxes:
                self.problems.add(f"a box object must have one of {', '.join(BOX_KEYS)}", value)
            for box in boxes if inner is not None else ():
                self._read_boxes(box, inner or image, 0)
        elif not isinstance(value, list) or not any(isinstance(item, list) for item in value):
            self._read_box(value, image)
        else:
            if level >= _LIST_LEVELS:
                self.problems.add("boxes must be one flat list of boxes, without lists in between", value)
            for item in value:
                self._read_boxes(item, image, level + 1)

    def _read_box(self, value: Any, image: int) -> None:
        if not (isinstance(value, list) and len(value) == 4 and all(_is_finite(number) for number in value)):
            self.problems.add("a box must have four finite numbers", value)
        elif self.num_images is not None and image > self.num_images:
            self.problems.add(f"a box's image must not be above the number of images, {self.num_images}", image)
        else:
            x1, y1, x2, y2 = map(float, value)
            self.boxes.append(Box(x1, y1, x2, y2, image))

    def _image_of(self, found: JsonObject, outer: int) -> int | None:
        """The image that an object names, else `outer`; None if what it names is no image."""
        named = found.values_of("image")
        if not named:
            return outer
        if any(image != named[0] for image in named):
            self.problems.add("a box object must name one image", named)
        elif type(named[0]) is not int or named[0] < 1:
            self.problems.add("a box's image must be an integer from 1", named[0])
        else:
            return named[0]
        return None


def _is_finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)
