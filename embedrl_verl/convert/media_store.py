# SPDX-License-Identifier: Apache-2.0
"""Media of the records: checked, and put where the user wants them, byte for byte (nothing is re-encoded).
docs/data.md says what the values of `place` and `verify` mean.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

from PIL import Image

from embedrl_verl.convert.converter import RowError
from embedrl_verl.data.files import MEDIA_FOLDER, STALE, publish, sha256_of, temporary_name
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
COUNTS = ("images", "videos", "frames", "animated", "paths")
"""What is counted, by reference: `paths` need a media root after placing; `animated` is 0 with verify "none"."""
MAX_IMAGE_BYTES = 256 << 20
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "TIFF")
REMEMBERED = 65536
"""Paths whose check is not repeated when the next rows name them again."""
FRAMES_CHECKED = 8


@dataclass(frozen=True)
class MediaStore:
    """The converter's paths are relative to `media_root`; `folder` is the data set's."""

    place: str
    verify: str
    media_root: Path | None
    folder: Path

    def __post_init__(self) -> None:
        _remembered.cache_clear()

    def check_folder(self) -> None:
        """Raise ConfigError if files would be stored among those of a person."""
        found = (self.folder / MEDIA_FOLDER).glob("*") if self.place == "files" else ()
        if foreign := next((path for path in found if not re.fullmatch("[0-9a-f]{2}", path.name)), None):
            raise ConfigError(
                f"{foreign} was not written by a conversion, and --media files would mix its own files with it; move "
                "it away, or name another folder with --out"
            )

    def remove_stale(self) -> None:
        """Remove what killed writers left; no other may be at work."""
        for stale in (self.folder / MEDIA_FOLDER).glob(f"??/{STALE}") if self.place == "files" else ():
            stale.unlink()

    def put(self, record: PairRecord, counts: Counter[str]) -> PairRecord:
        """The record with its media where they belong. All are checked before the first is written; `counts` grows.
        Raises RowError, naming the field, for a medium that cannot be used."""
        found, extensions = Counter[str](), dict[str, str]()
        for name, media, kind in media_fields(record):
            look = _remembered if isinstance(media, str) else _look
            try:
                extensions[name], is_animated = look(self.place, self.verify, self.media_root, media, kind)
            except MediaError as error:
                raise RowError(name, str(error)) from error
            except OSError as error:
                raise RowError(name, f"{describe(media)}: cannot be read ({error})") from error
            found[kind] += 1
            found["animated"] += is_animated
            found["paths"] += self.place == "files" or (self.place == "keep" and isinstance(media, str))
        items = (record.query, record.target, *record.negatives)
        found["videos"] = sum(item.video is not None for item in items)
        counts.update(found)
        if self.place == "keep" or not extensions:
            return record
        return map_media(record, lambda name, media: self._placed(media, extensions[name]))

    def _placed(self, media: Media, extension: str) -> Media:
        source = media if isinstance(media, bytes) else resolve_media_path(media, self.media_root)
        if self.place == "embed":
            return source if isinstance(source, bytes) else source.read_bytes()
        if isinstance(source, bytes):
            digest, size = hashlib.sha256(source).hexdigest(), len(source)
        else:
            digest, size = sha256_of(source), source.stat().st_size
        name = f"{digest[:2]}/{digest}.{extension}"
        target = self.folder / MEDIA_FOLDER / name
        if not (target.is_file() and target.stat().st_size == size):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(target)
            try:
                if isinstance(source, bytes):
                    temporary.write_bytes(source)
                else:
                    shutil.copyfile(source, temporary)
                publish(temporary, target, flush_folder=False)
            finally:
                temporary.unlink(missing_ok=True)
        return name


def media_fields(record: PairRecord) -> Iterator[tuple[str, Media, str]]:
    """(field, medium, "images" | "frames" | "videos") of every medium of a record, in order."""
    negatives = [(f"negatives[{index}]", item) for index, item in enumerate(record.negatives)]
    for name, item in [("query", record.query), ("target", record.target), *negatives]:
        yield from ((f"{name}.images[{index}]", media, "images") for index, media in enumerate(item.images))
        if item.video is not None:
            for index, media in enumerate(item.video.frames):
                yield f"{name}.video.frames[{index}]", media, "frames"
            if item.video.path is not None:
                yield f"{name}.video.path", item.video.path, "videos"


def map_media(record: PairRecord, change: Callable[[str, Media], Media]) -> PairRecord:
    """The record with every medium replaced by `change(field, medium)`."""
    new = iter([change(name, media) for name, media, _ in media_fields(record)])

    def changed(item: Item) -> Item:
        images, video = tuple(islice(new, len(item.images))), item.video
        if video is not None:
            frames = tuple(islice(new, len(video.frames)))
            video = replace(video, frames=frames, path=video.path and str(next(new)))
        return replace(item, images=images, video=video)

    query, target, *negatives = map(changed, (record.query, record.target, *record.negatives))
    return replace(record, query=query, target=target, negatives=tuple(negatives))


def _look(place: str, verify: str, root: Path | None, media: Media, kind: str) -> tuple[str, bool]:
    """(extension of a stored file, whether it is animated), after proof that training accepts the medium."""
    if verify == "none" and place != "files":
        path = PurePosixPath(media if isinstance(media, str) else "")
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise MediaError(f"media path {media!r} must be relative to the media root, without '..'")
        return "", False
    try:
        if kind == "videos":
            return _look_at_video(str(media), place, verify, root), False
        return _look_at_image(media, verify, root)
    except (EmbedRLError, OSError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything when bytes make no sense: the row is bad, the job goes on
        raise MediaError(f"{describe(media)}: cannot be decoded ({type(error).__name__}: {error})") from error


_remembered = lru_cache(maxsize=REMEMBERED)(_look)


def _look_at_image(media: Media, verify: str, root: Path | None) -> tuple[str, bool]:
    source = io.BytesIO(media) if isinstance(media, bytes) else resolve_media_path(media, root)
    size = len(media) if isinstance(source, io.BytesIO) else source.stat().st_size
    with image_errors(describe(media), source), warnings.catch_warnings():
        if size > MAX_IMAGE_BYTES:
            raise MediaError(f"{size} bytes are over the limit of {MAX_IMAGE_BYTES} for an image")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            width, height, form = image.width, image.height, str(image.format)
            animated = form in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
        if width * height > MAX_PIXELS:
            raise MediaError(f"{width}x{height} is over the limit of {MAX_PIXELS} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise MediaError(f"sides may differ by a factor of {MAX_ASPECT:.0f} at most; got {width}x{height}")
    if verify == "decode":
        load_image(media, root)
    return EXTENSIONS.get(form, form.lower()), animated


def _look_at_video(path: str, place: str, verify: str, root: Path | None) -> str:
    if place == "embed":
        way = "place media as files, or give its frames"
        raise MediaError(f"media path {path!r}: a video file cannot be embedded; {way}")
    full = resolve_media_path(path, root)
    if full.stat().st_size == 0:
        raise MediaError(f"media path {path!r}: the video file is empty")
    if verify == "decode":
        load_frames(Video(path=path), root, FRAMES_CHECKED)
    suffix = full.suffix[1:].lower()
    return suffix if re.fullmatch(r"[a-z0-9]{1,5}", suffix) else "bin"
