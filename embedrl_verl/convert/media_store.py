# SPDX-License-Identifier: Apache-2.0
"""Media of the records: checked, and put where the user wants them, byte for byte (nothing is re-encoded).

`place`:

- "keep": paths stay paths relative to the media root, bytes stay in the parquet files;
- "embed": images and frames become bytes in the parquet files, which then need no media root (videos given as files
  cannot, and are refused);
- "files": everything goes to `media/ab/<SHA-256>.<ext>` of the data set folder, which then is the media root. The same
  content is stored once.

`verify`:

- "none": paths must be relative and without "..", nothing is opened;
- "exists": the file is there, inside the media root; the header of an image is of a known format, with a size that
  training accepts;
- "decode": images are decoded completely and videos as far as training samples them.

Of an animated image (and of a TIFF with several pages) training sees the first frame; such images are kept and counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from embedrl_verl.convert.converter import RowError
from embedrl_verl.data.files import MEDIA_FOLDER, sha256_of, temporary_name
from embedrl_verl.data.media import (
    IMAGE_FORMATS,
    MAX_ASPECT,
    MAX_PIXELS,
    describe,
    image_errors,
    load_frames,
    load_image,
    resolve_media_path,
)
from embedrl_verl.data.schema import Item, Media, PairRecord, Video
from embedrl_verl.errors import ConfigError, EmbedRLError, MediaError

PLACES = ("keep", "embed", "files")
VERIFY = ("none", "exists", "decode")
MAX_IMAGE_BYTES = 256 << 20
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "TIFF")
REMEMBERED = 65536
"""Paths whose check is not repeated when the next rows name them again."""
FRAMES_CHECKED = 8


@dataclass
class MediaCounts:
    """What the records of a part hold, counted by reference. `paths` are those that need a media root after placing;
    `animated` is 0 with verify "none"."""

    images: int = 0
    videos: int = 0
    frames: int = 0
    animated: int = 0
    paths: int = 0

    def add(self, other: MediaCounts) -> None:
        """Sum in place."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class _Facts:
    extension: str
    is_animated: bool


class MediaStore:
    """Checks and places the media of records.

    Args:
        place, verify: see the module.
        media_root: folder that the converter's paths are relative to; None if there is none.
        folder: the data set folder.
    """

    def __init__(self, place: str, verify: str, media_root: str | Path | None, folder: str | Path) -> None:
        if place not in PLACES:
            raise ConfigError(f"the place of media must be one of {', '.join(PLACES)}; got {place!r}")
        if verify not in VERIFY:
            raise ConfigError(f"the check of media must be one of {', '.join(VERIFY)}; got {verify!r}")
        self.place, self.verify = place, verify
        self.media_root = None if media_root is None else Path(media_root).expanduser()
        self._media = Path(folder) / MEDIA_FOLDER
        self._seen: OrderedDict[str, _Facts] = OrderedDict()
        self._written: list[Path] = []

    def put(self, record: PairRecord, counts: MediaCounts) -> PairRecord:
        """The record with its media where they belong. All are checked before the first is written; `counts` grows."""
        items = (record.query, record.target, *record.negatives)
        if not any(item.images or item.video for item in items):
            return record
        found = MediaCounts()
        facts: dict[tuple[str, Media], _Facts] = {}
        for field, media, kind in media_fields(record):
            try:
                facts[field, media] = self._check(media, kind)
            except MediaError as error:
                raise RowError(field, str(error)) from error
            except OSError as error:
                raise RowError(field, f"{describe(media)}: cannot be read ({error})") from error
            found.animated += facts[field, media].is_animated
            found.paths += self.place == "files" or (self.place == "keep" and isinstance(media, str))
            setattr(found, kind, getattr(found, kind) + 1)
        found.videos = sum(item.video is not None for item in items)
        counts.add(found)
        if self.place == "keep":
            return record
        return map_media(record, lambda field, media: self._placed(media, facts[field, media]))

    def flush(self) -> None:
        """Make sure that the files written since the last call outlast a power failure."""
        for path in self._written:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        self._written = []

    def _check(self, media: Media, kind: str) -> _Facts:
        if isinstance(media, bytes):
            return self._look(media, kind)
        key = f"{kind}\0{media}"
        facts = self._seen.get(key)
        if facts is None:
            facts = self._seen[key] = self._look(media, kind)
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        return facts

    def _look(self, media: Media, kind: str) -> _Facts:
        if self.verify == "none" and self.place != "files":
            if isinstance(media, str):
                _check_form(media)
            return _Facts("", False)
        try:
            return self._look_at_video(str(media)) if kind == "videos" else self._look_at_image(media)
        except (EmbedRLError, OSError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything when bytes make no sense: the row is bad, the job goes on
            raise MediaError(f"{describe(media)}: cannot be decoded ({type(error).__name__}: {error})") from error

    def _look_at_image(self, media: Media) -> _Facts:
        source = self._source(media)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise MediaError(f"{describe(media)}: {size} bytes are over the limit of {MAX_IMAGE_BYTES} for an image")
        facts = _image_facts(io.BytesIO(source) if isinstance(source, bytes) else source, describe(media))
        if self.verify == "decode":
            load_image(media, self.media_root)
        return facts

    def _look_at_video(self, path: str) -> _Facts:
        if self.place == "embed":
            raise MediaError(
                f"media path {path!r}: a video file cannot be embedded; place media as files, or give its frames"
            )
        full = resolve_media_path(path, self.media_root)
        if full.stat().st_size == 0:
            raise MediaError(f"media path {path!r}: the video file is empty")
        if self.verify == "decode":
            load_frames(Video(path=path), self.media_root, FRAMES_CHECKED)
        suffix = full.suffix[1:].lower()
        return _Facts(suffix if re.fullmatch(r"[a-z0-9]{1,5}", suffix) else "bin", False)

    def _source(self, media: Media) -> bytes | Path:
        return media if isinstance(media, bytes) else resolve_media_path(media, self.media_root)

    def _placed(self, media: Media, facts: _Facts) -> Media:
        source = self._source(media)
        if isinstance(source, bytes):
            if self.place == "embed":
                return source
            digest, size = hashlib.sha256(source).hexdigest(), len(source)
        else:
            if self.place == "embed":
                return source.read_bytes()
            digest, size = sha256_of(source), source.stat().st_size
        name = f"{digest[:2]}/{digest}.{facts.extension}"
        target = self._media / name
        if not (target.is_file() and target.stat().st_size == size):
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, source)
            self._written.append(target)
        return name


def media_fields(record: PairRecord) -> Iterator[tuple[str, Media, str]]:
    """(field, medium, "images" | "frames" | "videos") of every medium of a record, in order."""
    for name, item in _items(record):
        for index, media in enumerate(item.images):
            yield f"{name}.images[{index}]", media, "images"
        if item.video is not None:
            for index, media in enumerate(item.video.frames):
                yield f"{name}.video.frames[{index}]", media, "frames"
            if item.video.path is not None:
                yield f"{name}.video.path", item.video.path, "videos"


def map_media(record: PairRecord, change: Callable[[str, Media], Media]) -> PairRecord:
    """The record with every medium replaced by `change(field, medium)`."""

    def changed(name: str, item: Item) -> Item:
        images = tuple(change(f"{name}.images[{index}]", media) for index, media in enumerate(item.images))
        video = item.video
        if video is not None and video.path is not None:
            path = change(f"{name}.video.path", video.path)
            assert isinstance(path, str), type(path)
            video = replace(video, path=path)
        elif video is not None:
            frames = (change(f"{name}.video.frames[{index}]", media) for index, media in enumerate(video.frames))
            video = replace(video, frames=tuple(frames))
        return replace(item, images=images, video=video)

    items = [changed(name, item) for name, item in _items(record)]
    return replace(record, query=items[0], target=items[1], negatives=tuple(items[2:]))


def _items(record: PairRecord) -> list[tuple[str, Item]]:
    negatives = [(f"negatives[{index}]", item) for index, item in enumerate(record.negatives)]
    return [("query", record.query), ("target", record.target), *negatives]


def _check_form(path: str) -> None:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise MediaError(f"media path {path!r} must be relative to the media root, without '..'")


def _image_facts(source: io.BytesIO | Path, name: str) -> _Facts:
    """What the header says, after proof that training accepts an image of this kind and size."""
    with image_errors(name, source), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            width, height, kind = image.width, image.height, str(image.format)
            animated = kind in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width}x{height} is over the limit of {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(f"{name}: sides may differ by a factor of {MAX_ASPECT:.0f} at most; got {width}x{height}")
    return _Facts(EXTENSIONS.get(kind, kind.lower()), animated)


def _write(target: Path, source: bytes | Path) -> None:
    temporary = temporary_name(target)
    try:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
