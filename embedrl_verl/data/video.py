# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, evenly spaced over the clip, decoded with PyAV (it comes with qwen-vl-utils).

Decoding is sequential and exact: no seeking, so the same file gives the same frames everywhere. For long films extract
the frames once and refer to them as a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from embedrl_verl.errors import MediaError

DEFAULT_FPS = 2.0
MIN_FRAMES = 4
TRUNCATED_BELOW = 0.9
"""Share of the frames that the header promises; less is a truncated file, a little less is a careless header."""


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a sample stand in their clip, as video metadata of transformers and vLLM say it.

    Attributes:
        rate: units a second; of a clip with a constant rate its frames a second.
        indices: of each frame, in units from the first frame that is shown.
        total: units of the whole clip.
    """

    rate: float
    indices: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> FrameTimes:
        """Of what `metadata` gives."""
        return cls(metadata["fps"], tuple(metadata["frames_indices"]), metadata["total_num_frames"])

    @property
    def fps(self) -> float:
        """Frames of the sample a second (`sampled_fps` of transformers)."""
        return len(self.indices) / self.total * self.rate

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time of each frame in seconds."""
        return tuple(index / self.rate for index in self.indices)

    def padded(self, count: int) -> FrameTimes:
        """Of the frames with the last one repeated until there are `count`; `fps` stays."""
        more = count - len(self.indices)
        if more <= 0:
            return self
        total = round(self.total * count / len(self.indices))
        return FrameTimes(self.rate, self.indices + self.indices[-1:] * more, max(total, count))

    def metadata(self) -> dict[str, Any]:
        """The keys that the processors of transformers and vLLM read; none samples the frames again."""
        return {"fps": self.rate, "frames_indices": list(self.indices), "total_num_frames": self.total}


def list_times(fps: float, total: int, kept: Sequence[int] | None = None) -> FrameTimes:
    """Of a clip given as a list of `total` frames, `fps` a second, of which `kept` (from 0; None: all) are drawn."""
    return FrameTimes(fps, tuple(range(total) if kept is None else kept), total)


def even_indices(total: int, count: int) -> list[int]:
    """`count` of 0..total-1, evenly spaced from first to last (halves round to even)."""
    if count == 1:
        return [0]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]


def sample_count(total: int, native_fps: float, fps: float, max_frames: int) -> int:
    """How many of `total` frames show the clip at `fps`: an even number (a visual token spans two frames) from 4 to
    `max_frames`, where the clip and the limit have as many; else 1."""
    wanted = min(max(total / native_fps * fps, MIN_FRAMES), max_frames, total)
    return max(int(wanted) // 2 * 2, 1)


def read_video(
    path: Path, name: str, fps: float, max_frames: int, max_pixels: int
) -> tuple[tuple[Image.Image, ...], FrameTimes]:
    """Decode the sampled frames (RGB, full resolution) and tell when they stand in the clip.

    Args:
        path: an existing file.
        name: the reference as the user wrote it, for messages.
        fps: frames per second to sample.
        max_frames: limit of the number of frames.
        max_pixels: limit of one frame in pixels.

    Raises:
        MediaError: no video stream, no frame, a frame over the limit, corrupt or truncated.
    """
    import av  # heavy, and needed only for video files

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"media path {name!r}: the file has no video stream")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > max_pixels:
                raise MediaError(f"media path {name!r}: {width}x{height} is over the limit of {max_pixels} pixels")
            native_fps = float(stream.average_rate or 0) or DEFAULT_FPS
            total, promised = sum(1 for packet in container.demux(stream) if packet.size), stream.frames
        if total == 0:
            raise MediaError(f"media path {name!r}: the video has no frames")
        if total < TRUNCATED_BELOW * promised:
            raise MediaError(f"media path {name!r}: the video ends early; it has {total} of {promised} frames")
        wanted = even_indices(total, sample_count(total, native_fps, fps, max_frames))
        picked: dict[int, Image.Image] = {}
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    picked[index] = frame.to_image().convert("RGB")
    except (av.error.FFmpegError, EOFError, UnicodeDecodeError) as error:  # the last: names in the file's metadata
        raise MediaError(f"media path {name!r}: not a readable video ({type(error).__name__}: {error})") from error
    if len(picked) < len(wanted):
        raise MediaError(f"media path {name!r}: only {len(picked)} of {len(wanted)} sampled frames can be decoded")
    return tuple(picked[index] for index in wanted), FrameTimes(native_fps, tuple(wanted), total)
