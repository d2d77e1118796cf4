# SPDX-License-Identifier: Apache-2.0
"""What a Reasoner is asked about and what it wrote, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from PIL import ExifTags, Image, ImageOps

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.media import DECODE_ERRORS, LoadedItem, load_image, load_item
from embedrl_verl.data.pixels import to_rgb
from embedrl_verl.data.schema import Item, PairRecord, Side, Video, input_kind
from embedrl_verl.data.video import DEFAULT_FPS, even_indices, list_times
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import ConfigError, DataError, EmbedderError, MediaError, ModelFailedError
from embedrl_verl.families import Family
from embedrl_verl.kinds import InputKind

FAILURES = (MediaError, DataError, EmbedderError)
"""What goes wrong with one input alone."""


class Ask(NamedTuple):
    """An input, decoded, and the kind of question that it is."""

    kind: InputKind
    item: LoadedItem


class PairSide(NamedTuple):
    """One side of a pair record, and the media root of its file."""

    record: PairRecord
    side: Side
    media_root: str | None = None

    def ask(self, max_frames: int = 8) -> Ask:
        """With decoded media; MediaError names what cannot be decoded."""
        item = load_item(self.record.item(self.side), self.media_root, max_frames=max_frames)
        return Ask(input_kind(self.record, self.side), item)


@dataclass(frozen=True)
class Written:
    """What a Reasoner wrote for one side: the T-CoT, and (width, height) in pixels of each image as it saw it; or why
    there is none. `tokens`: of the T-CoT, with that which ends it; None where they were not counted. `is_input_fault`:
    the problem is of the input, and not of the Reasoner or its server."""

    text: str | None
    seen_sizes: tuple[tuple[int, int], ...] | None = None
    problem: str = ""
    tokens: int | None = None
    is_input_fault: bool = True

    def about(self, item: LoadedItem, family: Family, evidence: EvidenceConfig) -> EmbedInput:
        """The item with this T-CoT and its evidence; EmbedderError if there is none. `family`: of who wrote it."""
        if self.text is None:
            raise (EmbedderError if self.is_input_fault else ModelFailedError)(self.problem)
        return EmbedInput.with_tcot(item, self.text, family, evidence, self.seen_sizes)


class Writes(Protocol):
    """A Reasoner, in this process or elsewhere. `family`: of its boxes."""

    family: Family

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """T-CoTs of inputs in their order, one failure a failing input."""


KEYS = ("text", "instruction", "image", "images", "video", "kind")
_KINDS: dict[str, Any] = {
    "text": str,
    "instruction": str,
    "images": (list, tuple),
    "video": (str, Path, list, tuple),
    "kind": str,
}
_WORDS = {"text": "a text", "instruction": "a text", "images": "a list", "video": "a path or a list", "kind": "a text"}


def ask_for(
    given: Any, side: Side, *, instruction: str = "", media_root: str | Path | None = None, max_frames: int = 8
) -> Ask:
    """The input of a caller as what a Reasoner is asked about.

    Args:
        given: a text; an RGB image; a mapping with some of `text`, `instruction`, `image` or `images` (images, paths or
            encoded bytes), `video` (a path, or a list of frames at 2 a second) and `kind` ("page" for a document page);
            an `Item` of a pair record, or a `LoadedItem`; or an `Ask`, whose kind stays, or a function that makes one
            when it is needed, so that few inputs are decoded at a time.
        instruction: of inputs that bring none.
        max_frames: frames drawn from a video.

    Raises:
        ConfigError: something else was given. MediaError: a medium cannot be decoded. DataError: it is empty, or its
            text is not Unicode.
    """
    if callable(given):
        given = given()
    if isinstance(given, Ask):
        return given if given.item.instruction else given._replace(item=replace(given.item, instruction=instruction))
    if isinstance(given, str):
        given = {"text": given}
    elif isinstance(given, Image.Image):
        given = {"image": given}
    if isinstance(given, Mapping):
        item = _from_mapping(given, media_root, max_frames)
    elif isinstance(given, Item):
        item = load_item(given, media_root, max_frames=max_frames)
    elif isinstance(given, LoadedItem):
        item = given
    else:
        raise ConfigError(
            f"an input must be a text, an image, a mapping with {', '.join(KEYS)}, or an Item; got a "
            f"{type(given).__name__}"
        )
    if not (item.text.strip() or item.images or item.frames):
        raise DataError("an input must have a text, an image or a video; it is empty")
    try:
        f"{item.text}{item.instruction}{instruction}".encode()
    except UnicodeEncodeError as error:  # JSON can hold half a character; tokenizers raise what nobody expects
        raise DataError(
            f"an input's text must be Unicode; it holds half of a surrogate pair ({error.reason})"
        ) from error
    if instruction and not item.instruction:
        item = replace(item, instruction=instruction)
    medium = "video" if item.frames else "image" if item.images else "text"
    if medium == "image" and item.kind == "page":
        medium = "page"
    return Ask(cast(InputKind, f"{side}_{medium}"), item)


def _from_mapping(given: Mapping[str, Any], media_root: str | Path | None, max_frames: int) -> LoadedItem:
    if unknown := sorted(set(given) - set(KEYS)):
        raise ConfigError(f"an input's keys must be {', '.join(KEYS)}; got {', '.join(map(repr, unknown))}")
    for name, kinds in _KINDS.items():
        if given.get(name) is not None and not isinstance(given[name], kinds):
            raise ConfigError(f"{name} must be {_WORDS[name]}; got a {type(given[name]).__name__}")
    images = given.get("images") or ()
    if given.get("image") is not None:
        images = (given["image"], *images)
    loaded, video = tuple(_image(one, media_root) for one in images), given.get("video")
    text, instruction = given.get("text") or "", given.get("instruction") or ""
    if isinstance(video, (str, Path)):
        root, name = (media_root, str(video)) if media_root is not None else (Path(video).parent, Path(video).name)
        clip = load_item(Item(video=Video(path=name)), root, max_frames=max_frames)
        return LoadedItem(text, instruction, loaded, clip.frames, clip.times, given.get("kind"))
    every = list(video or ())
    kept = even_indices(len(every), min(len(every), max_frames)) if every else []
    times = list_times(DEFAULT_FPS, len(every), kept) if every else None
    frames = tuple(_image(every[i], media_root) for i in kept)
    return LoadedItem(text, instruction, loaded, frames, times, given.get("kind"))


def _image(one: Any, media_root: str | Path | None) -> Image.Image:
    if isinstance(one, Image.Image):
        try:
            one.load()  # a file that was only opened may be broken
            is_upright = not one.getexif().get(ExifTags.Base.Orientation)
            return to_rgb(one if is_upright else ImageOps.exif_transpose(one))
        except DECODE_ERRORS as error:
            raise MediaError(f"an image of {one.width} x {one.height} pixels cannot be decoded: {error}") from error
    if isinstance(one, bytes):
        return load_image(one, None)
    if not isinstance(one, (str, Path)):
        raise ConfigError(f"an image must be an image, a path or encoded bytes; got {type(one).__name__}")
    if media_root is None:  # the caller's own file, wherever it is
        return load_image(Path(one).name, Path(one).expanduser().absolute().parent)
    return load_image(str(one), media_root)
