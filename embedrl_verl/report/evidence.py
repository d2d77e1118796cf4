# SPDX-License-Identifier: Apache-2.0
"""A T-CoT with its input, as a view: where its boxes lie, what is cut, what is wrong. For files and for RL rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from embedrl_verl.data.media import LoadedItem, MediaLimits, smart_resize
from embedrl_verl.errors import MediaError
from embedrl_verl.families import FACTS, BoxConvention, Family
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, InputKind
from embedrl_verl.report.text import is_in_text
from embedrl_verl.report.views import BoxView, Facts, Flag, PieceView, TcotView
from embedrl_verl.tcot import TCoT, boxes_to_pixels, cut_evidence, parse_tcot
from embedrl_verl.tcot.evidence import MAX_ASPECT, MAX_EVIDENCE, MIN_SIDE
from embedrl_verl.tcot.evidence.boxes import BOX_KEYS, RELATIVE_SIZE, Box, PixelBox
from embedrl_verl.tcot.json_objects import JsonObject, find_objects

WHOLE = 0.95
"""Share of the image from which a box points at nothing in particular."""
FAMILY_OF_CONVENTION: dict[BoxConvention, Family] = {facts.boxes: family for family, facts in FACTS.items()}
Size = tuple[int, int]


@dataclass(frozen=True)
class TcotReader:
    """Makes views of T-CoTs.

    Attributes:
        convention: units of the boxes.
        limits: sizes at which the Reasoner saw images, which absolute boxes refer to, and at which the Embedder reads
            pieces of evidence.
        min_side, max_aspect, max_evidence: as of `cut_evidence`.
    """

    convention: BoxConvention
    limits: MediaLimits
    min_side: int = MIN_SIDE
    max_aspect: float = MAX_ASPECT
    max_evidence: int = MAX_EVIDENCE

    def view(
        self,
        text: str,
        item: LoadedItem | None,
        kind: InputKind | None,
        *,
        title: str = "T-CoT",
        prefix: str = "",
        facts: Facts = (),
    ) -> TcotView:
        """View of a T-CoT and its input.

        Args:
            text: as the Reasoner wrote it.
            item: decoded originals; None if they cannot be decoded: then only the form is looked at.
            kind: decides which evidence is called for; None: any will do.
            prefix: before the names of boxes and key frames, where a side has several T-CoTs.
        """
        if item is None:
            tcot = parse_tcot(text)
        else:
            tcot = parse_tcot(text, num_frames=len(item.frames) or None, num_images=len(item.images) or None)
        flags: list[Flag] = [] if tcot.is_well_formed else [Flag("form", "; ".join(tcot.problems) + ".")]
        required = None if kind is None else EVIDENCE_KEY_OF_KIND[kind]
        if not any(tcot.has_evidence(key) for key in ([required] if required else EVIDENCE_KEY_OF_KIND.values())):
            flags.append(Flag("no_evidence", f"This kind of input calls for {required or 'some evidence'}."))
        if item is None:
            return TcotView(title, tcot, facts=facts, flags=tuple(flags), prefix=prefix)
        try:
            seen = [self._fitted(image.size) for image in item.images]
        except MediaError as error:
            return TcotView(title, tcot, facts=facts, flags=(*flags, Flag("media", f"{error}.")), prefix=prefix)
        boxes = self._boxes(tcot, item, seen, prefix)
        missing: tuple[str, ...] = ()
        words = f"{item.instruction}\n{item.text}"
        if tcot.text_keywords:
            missing = tuple(word for word in dict.fromkeys(tcot.text_keywords) if not is_in_text(word, words))
        flags += self._box_flags(boxes, item, seen)
        if missing:
            flags.append(Flag("keyword", f"{_quoted(missing)} {'is' if len(missing) == 1 else 'are'} not in the text."))
        pieces = self._pieces(tcot, item, seen, boxes, prefix)
        whole = {(box.image, box.pixels) for box in boxes if not box.status} | set(tcot.key_frames)
        if len(whole) > len(pieces):
            flags.append(Flag("too_much", f"It points at {len(whole)} places; {len(pieces)} are cut."))
        return TcotView(title, tcot, boxes, pieces, missing, facts, tuple(flags), prefix)

    def _fitted(self, size: Size) -> Size:
        """(width, height) at which a model reads a picture."""
        low, high = self.limits.tokens(is_frame=False)
        height, width = smart_resize(
            size[1], size[0], token_side=self.limits.token_side, min_tokens=low, max_tokens=high
        )
        return width, height

    def _boxes(self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size], prefix: str) -> tuple[BoxView, ...]:
        labels = _labels(tcot.text)
        views: list[BoxView] = []
        for number, box in enumerate(tcot.boxes, 1):
            pixels = self._pixels(box, item, seen)
            status = "" if pixels is None else self._refusal(tcot, box, item, seen)
            if pixels is None:
                status = (
                    "no area inside the image" if box.image <= len(item.images) else f"there is no image {box.image}"
                )
            corners = (box.x1, box.y1, box.x2, box.y2)
            name = f"{prefix}{number}"
            views.append(BoxView(name, number - 1, corners, box.image, pixels, labels.get(corners, ""), status))
        return tuple(views)

    def _pixels(self, box: Box, item: LoadedItem, seen: Sequence[Size]) -> PixelBox | None:
        if box.image > len(item.images):
            return None
        width, height = item.images[box.image - 1].size
        resized_width, resized_height = seen[box.image - 1]
        pixels = boxes_to_pixels(
            [box],
            convention=self.convention,
            width=width,
            height=height,
            resized_width=resized_width,
            resized_height=resized_height,
        )
        return pixels[0] if pixels else None

    def _refusal(self, tcot: TCoT, box: Box, item: LoadedItem, seen: Sequence[Size]) -> str:
        """Why `cut_evidence` leaves the box out; "" if it takes it."""
        alone = replace(tcot, evidence={"bbox_2d": (box,)})
        return "; ".join(self._cut(alone, item, seen, max_evidence=1).problems)

    def _cut(self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size], max_evidence: int) -> Any:
        return cut_evidence(
            tcot,
            images=item.images,
            frames=item.frames,
            family=FAMILY_OF_CONVENTION[self.convention],
            resized_sizes=seen,
            min_side=self.min_side,
            max_aspect=self.max_aspect,
            max_evidence=max_evidence,
        )

    def _pieces(
        self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size], boxes: Sequence[BoxView], prefix: str
    ) -> tuple[PieceView, ...]:
        """The evidence that the Embedder gets, in its order, with the names of what it was cut for."""
        images: Sequence[Image.Image] = self._cut(tcot, item, seen, self.max_evidence).images
        cut: dict[tuple[int, PixelBox], BoxView] = {}
        for box in boxes:
            if box.pixels is not None and not box.status:
                cut.setdefault((box.image, box.pixels), box)
        names: list[tuple[str, int | None]] = []
        names += [(box.name, box.colour) for box in cut.values()][: self.max_evidence]
        frames = [frame for frame in dict.fromkeys(tcot.key_frames) if 1 <= frame <= len(item.frames)]
        names += [(f"frame {prefix}{frame}", None) for frame in frames][: self.max_evidence - len(names)]
        return tuple(
            PieceView(name, colour, image, self._fitted(image.size))
            for (name, colour), image in zip(names, images, strict=True)
        )

    def _box_flags(self, boxes: Sequence[BoxView], item: LoadedItem, seen: Sequence[Size]) -> list[Flag]:
        flags = []
        lost = [box for box in boxes if box.pixels is None]
        if lost:
            flags.append(Flag("lost_box", f"Box {_names(lost)}: {lost[0].status}."))
        tiny = [box for box in boxes if box.pixels is not None and box.status]
        if tiny:
            flags.append(Flag("tiny_box", f"Box {_names(tiny)}: {tiny[0].status}."))
        outside = [box for box in boxes if box.image <= len(item.images) and self._is_outside(box, seen)]
        if outside:
            units = "0 to 1000" if self.convention == "relative_1000" else "pixels of the image as the Reasoner saw it"
            flags.append(
                Flag("units", f"Box {_names(outside)} reaches outside its image: boxes are read as {units} (--boxes).")
            )
        whole = [box for box in boxes if box.pixels is not None and self._is_whole(box, item)]
        if whole:
            flags.append(Flag("whole_image", f"Box {_names(whole)} holds {WHOLE:.0%} of its image or more."))
        return flags

    def _is_outside(self, box: BoxView, seen: Sequence[Size]) -> bool:
        width, height = seen[box.image - 1]
        if self.convention == "relative_1000":
            width, height = RELATIVE_SIZE, RELATIVE_SIZE
        x1, y1, x2, y2 = box.written
        return min(x1, y1) < 0 or max(x1, x2) > width or max(y1, y2) > height

    def _is_whole(self, box: BoxView, item: LoadedItem) -> bool:
        assert box.pixels is not None
        x1, y1, x2, y2 = box.pixels
        width, height = item.images[box.image - 1].size
        return (x2 - x1) * (y2 - y1) >= WHOLE * width * height


def _labels(text: str) -> dict[tuple[float, ...], str]:
    """Labels that stand beside boxes in the JSON of a T-CoT, by the box's numbers; form does not know them."""
    labels: dict[tuple[float, ...], str] = {}

    def walk(value: object) -> None:
        if isinstance(value, JsonObject):
            names = [name for name in value.values_of("label") if isinstance(name, str)]
            for key, inner in value:
                numbers = inner if key in BOX_KEYS and isinstance(inner, list) else []
                if names and len(numbers) == 4 and all(isinstance(number, (int, float)) for number in numbers):
                    labels.setdefault(tuple(map(float, numbers)), names[0])
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for _, _, found in find_objects(text):
        walk(found)
    return labels


def _names(boxes: Sequence[BoxView]) -> str:
    return ", ".join(box.name for box in boxes[:8]) + (" and others" if len(boxes) > 8 else "")


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"“{word}”" for word in words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
