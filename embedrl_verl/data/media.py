# SPDX-License-Identifier: Apache-2.0
"""Media of an item: safe references, decoding of originals, and the size at which a model sees them.

Two sizes matter. Evidence is cut from the *original* (`load_item`), while a model reads a *fitted* copy (`fit_image`)
whose sides are whole visual tokens within `MediaLimits`. The length filter, the rollout and the Embedder all call these
functions, so what is counted is what runs.

Media are what a person sees: an image is turned as its EXIF orientation says (boxes are of the turned image, and
servers are sent it), transparent pixels are white.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from embedrl_verl.config.schema import MediaTokens
from embedrl_verl.data.pixels import decode_rgb, to_rgb
from embedrl_verl.data.schema import Item, Media, Video
from embedrl_verl.data.video import DEFAULT_FPS, FrameTimes, check_length, even_indices, list_times, read_video
from embedrl_verl.errors import ConfigError, MediaError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485
"""Largest accepted image in pixels (a quarter GiB of RGB, Pillow's own warning level): guards against bombs."""
MAX_ASPECT = 200.0
"""Largest ratio of sides that the Qwen-VL processors accept."""

# What Pillow's decoders raise on broken files; OSError covers "truncated" and "cannot identify", TypeError comes of a
# TIFF tag of another type.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class LoadedItem:
    """An item with decoded originals (RGB, full resolution).

    Attributes:
        text, instruction, kind: as in `Item`.
        images: the images in order.
        frames: the sampled frames of the video in order; key frame k (from 1) is `frames[k - 1]`.
        times: when `frames` stand in their clip; None without a video.
    """

    text: str
    instruction: str
    images: tuple[Image.Image, ...]
    frames: tuple[Image.Image, ...]
    times: FrameTimes | None = None
    kind: str | None = None


@dataclass(frozen=True)
class MediaLimits:
    """How large media may be for a model, in visual tokens; one token shows token_side x token_side pixels.

    Attributes:
        token_side: 28 (Qwen2-VL, Qwen2.5-VL) or 32 (Qwen3-VL) pixels.
        image_min_tokens, image_max_tokens: tokens of one image.
        frame_min_tokens, frame_max_tokens: tokens of one video frame (before frames are merged in twos).
        max_frames: frames drawn from a video.
    """

    token_side: int
    image_min_tokens: int = 4
    image_max_tokens: int = 768
    frame_min_tokens: int = 4
    frame_max_tokens: int = 300
    max_frames: int = 8

    def __post_init__(self) -> None:
        if self.token_side not in (28, 32):
            raise ConfigError(
                f"token_side must be 28 (Qwen2-VL, Qwen2.5-VL) or 32 (Qwen3-VL) px; got {self.token_side}"
            )
        for name in ("image", "frame"):
            low, high = self.tokens(is_frame=name == "frame")
            if not 1 <= low <= high:
                raise ConfigError(f"{name} tokens must satisfy 1 <= minimum <= maximum; got {low} and {high}")
        if self.max_frames < 1:
            raise ConfigError(f"max_frames must be at least 1; got {self.max_frames}")

    @classmethod
    def of(cls, section: MediaTokens, token_side: int, max_frames: int) -> MediaLimits:
        """The limits of a section of the configuration for a model with visual tokens of `token_side` pixels."""
        image = section.image_min_tokens, section.image_max_tokens
        return cls(token_side, *image, section.frame_min_tokens, section.frame_max_tokens, max_frames)

    def tokens(self, *, is_frame: bool) -> tuple[int, int]:
        """(minimum, maximum) tokens of a frame or of an image."""
        if is_frame:
            return self.frame_min_tokens, self.frame_max_tokens
        return self.image_min_tokens, self.image_max_tokens

    def most_tokens(self, *, is_frame: bool) -> int:
        """Upper bound of the tokens of a fitted frame or image, which can be above its maximum.

        `smart_resize` keeps a side at one token at least, so a strip has up to sqrt(aspect x maximum) tokens; and it
        rounds both sides up where it enlarges to the minimum.
        """
        low, high = self.tokens(is_frame=is_frame)
        strip = math.ceil(math.sqrt(MAX_ASPECT * high))
        enlarged = low + math.ceil(math.sqrt(MAX_ASPECT * low)) + math.ceil(math.sqrt(low)) + 1
        return max(high, strip, enlarged)


def smart_resize(height: int, width: int, *, token_side: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Size (height, width) in pixels at which a Qwen-VL model reads an image: both multiples of `token_side`.

    Each side is rounded to the nearest multiple (halves to even), then both are scaled down or up together until
    the tokens, (height / token_side) * (width / token_side), lie within the limits.
    """
    if min(height, width) < 1:
        raise MediaError(f"an image must have at least 1x1 pixels; got {width}x{height}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(f"an image's sides may differ by a factor of {MAX_ASPECT:.0f} at most; got {width}x{height}")
    new_height = max(token_side, round(height / token_side) * token_side)
    new_width = max(token_side, round(width / token_side) * token_side)
    pixels, min_pixels, max_pixels = new_height * new_width, min_tokens * token_side**2, max_tokens * token_side**2
    if pixels > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(token_side, math.floor(height / shrink / token_side) * token_side)
        new_width = max(token_side, math.floor(width / shrink / token_side) * token_side)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / token_side) * token_side
        new_width = math.ceil(width * grow / token_side) * token_side
    return new_height, new_width


def fit_image(image: Image.Image, limits: MediaLimits, is_frame: bool = False) -> Image.Image:
    """The RGB image as a model with these limits reads it; a processor with wider limits leaves it as it is."""
    low, high = limits.tokens(is_frame=is_frame)
    height, width = smart_resize(
        image.height, image.width, token_side=limits.token_side, min_tokens=low, max_tokens=high
    )
    rgb = to_rgb(image)
    return rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.BICUBIC)


def fit_clip(frames: Sequence[Image.Image], limits: MediaLimits) -> list[Image.Image]:
    """Frames at the size that the first one calls for; an odd clip repeats its last frame, since a visual token spans
    two."""
    first = fit_image(frames[0], limits, is_frame=True)
    fitted = [first] + [to_rgb(frame).resize(first.size, Image.Resampling.BICUBIC) for frame in frames[1:]]
    return fitted + fitted[-1:] * (len(fitted) % 2)


def resolve_media_path(path: str, media_root: str | Path | None) -> Path:
    """Absolute path of a media reference, after proof that it is a file inside the media root."""
    if media_root is None:
        raise MediaError(
            f"media path {path!r} needs a media root, and none is set; set data.media_root (commands: --media-root)"
        )
    if "\0" in path:
        raise MediaError(f"media path {path!r} holds a null character")
    if Path(path).is_absolute():
        raise MediaError(f"media path {path!r} is absolute; paths must be relative to the media root {media_root}")
    try:
        root = Path(media_root).expanduser().resolve()
        full = (root / path).resolve()
        is_file = full.is_file()
    except (OSError, RuntimeError) as error:  # no permission, name too long, loop of symbolic links
        raise MediaError(f"media path {path!r} cannot be looked up in the media root {media_root}: {error}") from error
    if not full.is_relative_to(root):
        raise MediaError(f"media path {path!r} leaves the media root {root}; keep media inside it")
    if not is_file and not root.is_dir():
        raise MediaError(f"media path {path!r}: the media root {root} is no folder; check the path")
    if not is_file:
        raise MediaError(f"media path {path!r}: no such file in the media root {root}")
    return full


@contextmanager
def image_errors(name: str, source: Path | io.BytesIO) -> Iterator[None]:
    """Turn what Pillow raises on an image that is too large or broken into a MediaError that begins with `name`.

    `source` is what was given to Pillow.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: over the limit of {MAX_PIXELS} pixels ({error})") from error
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    except DECODE_ERRORS as error:
        why = str(error).replace(repr(source), "these bytes")  # Pillow names a buffer by its address in memory
        raise MediaError(f"{name}: not a readable image ({type(error).__name__}: {why})") from error


def load_image(media: Media, media_root: str | Path | None) -> Image.Image:
    """Decode one image completely: RGB, full resolution. Of an animation, the first frame."""
    source = resolve_media_path(media, media_root) if isinstance(media, str) else io.BytesIO(media)
    with image_errors(describe(media), source), Image.open(source, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(f"{image.width}x{image.height} is over the limit of {MAX_PIXELS} pixels")
        return decode_rgb(image)


def load_frames(
    video: Video, media_root: str | Path | None, max_frames: int
) -> tuple[tuple[Image.Image, ...], FrameTimes]:
    """At most `max_frames` frames, evenly spaced from first to last, and when they stand in the clip.

    A file is sampled at `video.fps` (2.0 if unset) as `embedrl_verl.data.video.read_video` describes; of a list of
    frames all are kept, or `max_frames` of them.
    """
    if video.path is not None:
        full = resolve_media_path(video.path, media_root)
        return read_video(full, video.path, video.fps or DEFAULT_FPS, max_frames, MAX_PIXELS)
    frames, times = drawn_frames(video, max_frames)
    check_length(times, f"video of {len(video.frames)} frames")
    return tuple(load_image(frame, media_root) for frame in frames), times


def drawn_frames(video: Video, max_frames: int) -> tuple[tuple[Media, ...], FrameTimes]:
    """References of the frames that are drawn from a list of frames, and when they stand in the clip."""
    total = len(video.frames)
    keep = even_indices(total, min(total, max_frames))
    return tuple(video.frames[index] for index in keep), list_times(video.fps or DEFAULT_FPS, total, keep)


def load_item(item: Item, media_root: str | Path | None, *, max_frames: int = 8) -> LoadedItem:
    """Decode all media of an item; a MediaError names the path (or the bytes) and the reason."""
    frames, times = load_frames(item.video, media_root, max_frames) if item.video else ((), None)
    images = tuple(load_image(media, media_root) for media in item.images)
    return LoadedItem(item.text, item.instruction, images, frames, times, item.kind)


def describe(media: Media) -> str:
    """Name of a media reference for messages: the path, or the length of the bytes."""
    return f"media path {media!r}" if isinstance(media, str) else f"media of {len(media)} bytes"
