# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, evenly spaced over the clip, decoded with PyAV (it comes with qwen-vl-utils).

Decoding is sequential and exact: no seeking, so the same file gives the same frames everywhere. For long films extract
the frames once and refer to them as a list.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from embedrl_verl.errors import MediaError

DEFAULT_FPS = 2.0
MIN_FRAMES = 4
TRUNCATED_BELOW = 0.9
"""Share of the frames that the header promises; less is a truncated file, a little less is a careless header."""


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
) -> tuple[tuple[Image.Image, ...], float]:
    """Decode the sampled frames (RGB, full resolution) and tell their frames per second.

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
    return tuple(picked[index] for index in wanted), len(wanted) / total * native_fps
