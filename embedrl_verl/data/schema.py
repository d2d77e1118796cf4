# SPDX-License-Identifier: Apache-2.0
"""Pair records: what is searched for (query) and what answers it (target), each with text, images or a video.

Every stage (contrastive training, RL, evaluation) reads the same records. Media are references until
`embedrl_verl.data.media.load_item` decodes them: a path relative to the media root, or the bytes of an image file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

from embedrl_verl.errors import DataError
from embedrl_verl.kinds import InputKind

Media: TypeAlias = str | bytes
Side: TypeAlias = Literal["query", "target"]
SIDES: tuple[Side, Side] = ("query", "target")
ITEM_KINDS = (None, "page")


def _check_media(name: str, media: object) -> None:
    """A string in place of a tuple would be one image a letter."""
    if not isinstance(media, tuple) or not all(isinstance(one, str | bytes) for one in media):
        raise DataError(
            f"{name} must be a tuple of paths (str) and encoded images (bytes), as ('a.png',); got "
            f"{type(media).__name__} {repr(media)[:60]}"
        )


@dataclass(frozen=True)
class Video:
    """A clip: a list of frames in order, or the path of a video file.

    Attributes:
        frames: images of the clip, first to last.
        path: video file, relative to the media root.
        fps: frames per second. Of `frames`: how many of them show one second. Of a file: the rate to sample at.
    """

    frames: tuple[Media, ...] = ()
    path: str | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if bool(self.frames) == bool(self.path):
            raise DataError(
                f"video must have exactly one of frames and path; got {len(self.frames)} frames and path {self.path!r}"
            )
        _check_media("video.frames", self.frames)
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise DataError(f"video.fps must be a positive number or null; got {self.fps}")


@dataclass(frozen=True)
class Item:
    """One side of a pair. Hashable, so that decoded media can be cached by item.

    Attributes:
        text: the side's own text, without the instruction.
        images: image references in the order in which the text speaks of them.
        video: a clip; beside images, the clip is the main input.
        instruction: what is asked of the input.
        kind: "page" marks images of document pages; else None.
        tcot: an annotated T-CoT, for contrastive training; "" = none. RL never reads it.
    """

    text: str = ""
    images: tuple[Media, ...] = ()
    video: Video | None = None
    instruction: str = ""
    kind: str | None = None
    tcot: str = ""

    def __post_init__(self) -> None:
        _check_media("images", self.images)
        if self.video is not None and not isinstance(self.video, Video):
            raise DataError(
                "video must be Video(path='a.mp4') or Video(frames=('0.png', '1.png'), fps=2.0); got "
                f"{repr(self.video)[:60]}"
            )
        if self.kind not in ITEM_KINDS:
            raise DataError(f"kind must be null or 'page'; got {self.kind!r}")
        if self.kind == "page" and not self.images:
            raise DataError("kind 'page' marks images of document pages, but the item has no image")

    @property
    def is_empty(self) -> bool:
        """True without text (white space does not count), image and video."""
        return not (self.text.strip() or self.images or self.video)


@dataclass(frozen=True)
class PairRecord:
    """One query and its target.

    Attributes:
        pair_id: unique in a data set.
        data_source: name of the source; a batch holds one source, metrics are reported by source.
        instruction: the task, said to the query side.
        query, target: the two sides.
        target_id: targets of the same id have the same content; "" = told by text and media.
        negatives: hard negatives of the query, for contrastive training.
        query_id: queries of the same id ask for the same; "" = told by instruction, text and media. Pairs with an equal
            query or an equal target are never negatives of each other.
    """

    pair_id: str
    data_source: str
    instruction: str
    query: Item
    target: Item
    target_id: str = ""
    negatives: tuple[Item, ...] = ()
    query_id: str = ""

    def __post_init__(self) -> None:
        for name, value in (("pair_id", self.pair_id), ("data_source", self.data_source)):
            if not value:
                raise DataError(f"{name} must not be empty")
        sides = [("query", self.query), ("target", self.target)]
        sides += [(f"negatives[{index}]", item) for index, item in enumerate(self.negatives)]
        for name, item in sides:
            if item.is_empty:
                raise DataError(f"{name} must have text, images or a video; all three are empty")

    def item(self, side: Side) -> Item:
        """The item of a side; the query carries the record's instruction unless it has its own."""
        if side == "target":
            return self.target
        return replace(self.query, instruction=self.query.instruction or self.instruction)


def input_kind(record: PairRecord, side: Side) -> InputKind:
    """The kind of input on a side, which decides the prompt template and the evidence key.

    The main input is the video, else the images, else the text. A text-only query is `query_text_to_video` when its
    target is a video.
    """
    item = record.query if side == "query" else record.target
    if item.video:
        medium = "video"
    elif item.images:
        medium = "page" if item.kind == "page" else "image"
    else:
        medium = "text_to_video" if side == "query" and record.target.video else "text"
    return cast(InputKind, f"{side}_{medium}")
