# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, evenly spaced in time over the clip, decoded with PyAV (it comes with qwen-vl-utils).

Frames are what a player shows: of the largest stream that is no cover picture, without what an edit list hides, turned
upright, stretched where pixels are not square, transparency on white. Fields are not separated and HDR is not mapped.
Where the rate varies, a frame of the sample is the one on the screen at its time, so a still moment may give it twice.

Decoding is sequential and exact: no seeking, so the same file gives the same frames everywhere. For long films extract
the frames once and refer to them as a list.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from embedrl_verl.data.pixels import to_rgb
from embedrl_verl.errors import MediaError

DEFAULT_FPS = 2.0
MIN_FRAMES = 4
CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg"),
    *("asf", "gif", "apng", "ivf", "h264", "hevc", "av1", "obu", "m4v", "mjpeg", "jpeg_pipe", "rm", "mxf", "nut", "dv"),
    *("wav", "mp3"),  # without a picture; the error says so
)
"""Formats whose frames lie in the file itself. A playlist (HLS, DASH, concat) or a pattern of image files would open
other files, also such that lie outside the media root."""
MAX_SECONDS = 12 * 3600
"""Longest clip. Qwen2.5-VL counts two positions a second; vLLM's table for a model of 32,768 tokens ends at 131,072."""
TRUNCATED_BELOW = 0.9
"""Share of the frames that the header promises; less is a truncated file, a little less is a careless header."""


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a sample stand in their clip, as video metadata of transformers and vLLM say it.

    `rate`: units a second, of a clip with a constant rate its frames a second; `indices`: of each frame, in units from
    the first frame that is shown; `total`: units of the whole clip.
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


@dataclass(frozen=True)
class Stamps:
    """Time stamps of the frames that a player shows, in their order.

    `pts`: in units of `time_base` (seconds), None where the file tells none; `last`: duration of the last frame in the
    same units, 0 if unknown; `rates`: frames a second that the file claims, the likeliest first.
    """

    pts: tuple[int | None, ...]
    last: int
    time_base: Fraction
    rates: tuple[Fraction, ...]

    def sample(self, fps: float, max_frames: int) -> tuple[list[int], FrameTimes]:
        """Which frames (from 0) show the clip at `fps`, and when they stand in it.

        Units are frames where the rate is constant, else milliseconds; then a frame may be there twice.
        """
        total = len(self.pts)
        rate = self._constant_rate()
        if rate is not None:
            wanted = even_indices(total, sample_count(total, rate, fps, max_frames))
            return wanted, FrameTimes(rate, tuple(wanted), total)
        pts = [stamp for stamp in self.pts if stamp is not None]
        milliseconds = [round((stamp - pts[0]) * self.time_base * 1000) for stamp in pts]
        last = self.last if self.last > 0 else pts[-1] - pts[-2]
        length = max(round((pts[-1] - pts[0] + last) * self.time_base * 1000), milliseconds[-1] + 1)
        count = sample_count(total, total / length * 1000, fps, max_frames)
        if count == total:
            return list(range(total)), FrameTimes(1000.0, tuple(milliseconds), length)
        times = even_indices(milliseconds[-1] + 1, count)
        wanted = [bisect_right(milliseconds, time) - 1 for time in times]  # what is on the screen then
        return wanted, FrameTimes(1000.0, tuple(times), length)

    def _constant_rate(self) -> float | None:
        """Frames a second; None: it varies. Stamps are rounded to `time_base`, so a rate that the file claims and that
        fits them is the exact one. Without stamps in order, the claim is all there is."""
        pts = [stamp for stamp in self.pts if stamp is not None]
        if len(pts) < max(len(self.pts), 2) or pts[0] >= pts[-1] or pts != sorted(pts):
            return float(self.rates[0]) if self.rates else DEFAULT_FPS
        step = Fraction(pts[-1] - pts[0], len(pts) - 1)
        slack = min(Fraction(2), step / 4)  # ticks; a tick may be as long as a frame, then one that is left out counts
        if any(abs(stamp - pts[0] - step * index) > slack for index, stamp in enumerate(pts)):
            return None
        fitting = [rate for rate in self.rates if abs(1 / rate / self.time_base - step) * (len(pts) - 1) <= slack]
        return float(fitting[0] if fitting else 1 / step / self.time_base)


def check_length(times: FrameTimes, name: str) -> None:
    """Raises MediaError for a clip that is longer than `MAX_SECONDS`; `name` is for the message."""
    seconds = times.total / times.rate
    if seconds > MAX_SECONDS:
        raise MediaError(
            f"{name}: a clip may be {MAX_SECONDS // 3600} hours long; its time stamps (or video.fps) say "
            f"{seconds / 3600:.4g} hours. Cut it into parts"
        )


def read_video(
    path: Path, name: str, fps: float, max_frames: int, max_pixels: int
) -> tuple[tuple[Image.Image, ...], FrameTimes]:
    """Decode the sampled frames (RGB, full resolution, of the first one's size) and tell when they stand in the clip.

    `name` is the reference as the user wrote it, for messages; `fps`: frames a second to sample, `max_frames` at most;
    `max_pixels`: limit of one frame.
    """
    clip = _Clip(path, name, max_pixels)
    stamps = clip.read_packets()
    expected = len(stamps.pts)
    # Packets tell which frames will be shown, but for fields of their own and pictures that are never shown. Where the
    # frames that came say otherwise, they are right, and the clip is decoded once more.
    for _ in range(3):
        wanted, times = stamps.sample(fps, max_frames)
        check_length(times, f"media path {name!r}")
        frames, stamps = clip.decode(wanted, expected)
        if len(frames) == len(wanted) and stamps.sample(fps, max_frames) == (wanted, times):
            return frames, times
    raise clip.refused("it has other frames each time it is decoded")


@dataclass(frozen=True)
class _Clip:
    path: Path
    name: str
    max_pixels: int

    def refused(self, why: str) -> MediaError:
        return MediaError(f"media path {self.name!r}: {why}")

    def read_packets(self) -> Stamps:
        """Stamps of the frames that the packets promise."""
        with self._opened() as (container, stream):
            # Of an MP4 with an edit list the index has the frames that it needs, of an AVI those that are there; the
            # header counts all. A Matroska file has its length alone.
            promised = min(stream.frames, len(stream.index_entries) or stream.frames)
            length = Fraction(container.duration or 0, 1000000) if "matroska" in container.format.name else 0
            is_vp8 = stream.codec_context.name == "vp8"  # its hidden pictures are packets of their own
            found, end = 0, Fraction(0)
            stamps = []
            for packet in _packets(container):
                duration = packet.duration or 0
                if packet.pts is not None:
                    end = max(end, (packet.pts + duration) * packet.time_base)
                if packet.stream_index == stream.index and packet.size:
                    found += 1
                    if not packet.is_discard and not (is_vp8 and not memoryview(packet)[0] & 16):
                        stamps.append((packet.pts, duration))
            if found < TRUNCATED_BELOW * promised:
                raise self.refused(f"the video ends early; it has {found} of {promised} frames")
            if end < TRUNCATED_BELOW * length:
                raise self.refused(f"the video ends early; it has {float(end):.1f} of {float(length):.1f} seconds")
            if all(pts is not None for pts, _ in stamps):
                stamps.sort()  # packets come in the order of decoding
            return self._stamps(container, stream, stamps)

    def decode(self, wanted: Sequence[int], expected: int) -> tuple[tuple[Image.Image, ...], Stamps]:
        """The frames `wanted`, as far as there are that many, and the stamps of all; `expected`: how many frames the
        packets promise."""
        chosen = frozenset(wanted)
        frames: dict[int, Image.Image] = {}
        size: tuple[int, int] | None = None
        stamps: list[tuple[int | None, int]] = []
        packets_a_frame = 1
        with self._opened() as (container, stream):
            aspect = stream.sample_aspect_ratio or Fraction(1)
            for frame in (frame for packet in _packets(container, stream) for frame in packet.decode()):
                if _is_hidden(container, frame.pts):
                    continue
                if len(stamps) in chosen:
                    image = self._picture(frame, aspect)
                    size = size or image.size
                    frames[len(stamps)] = image if image.size == size else image.resize(size)
                stamps.append((frame.pts, frame.duration))
                if frame.interlaced_frame:
                    packets_a_frame = 2  # each field may be one
            if len(stamps) * packets_a_frame < TRUNCATED_BELOW * expected:
                raise self.refused(f"only {len(stamps)} of {expected} frames can be decoded")
            shown = tuple(frames[index] for index in wanted if index in frames)
            return shown, self._stamps(container, stream, stamps)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The file and its stream: the largest that is no cover picture and can be decoded."""
        import av  # heavy, and needed only for video files

        covers = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        try:
            formats = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
            with av.open(str(self.path), options=formats) as container:
                streams = [stream for stream in container.streams.video if not stream.disposition & covers]
                if not streams:
                    cover = ", only a cover picture" if container.streams.video else ""
                    raise self.refused(f"the file has no video stream{cover}")
                known = [stream for stream in streams if stream.codec_context is not None]
                if not known:
                    raise self.refused("its codec is unknown to this build of FFmpeg; encode the video as H.264")
                stream = max(known, key=lambda one: (one.width * one.height, one.frames))
                self._check_size(stream.width, stream.height)
                stream.codec_context.options = {"max_pixels": str(2 * self.max_pixels)}  # decoders pad the sides
                yield container, stream
        except (av.error.FFmpegError, EOFError, UnicodeDecodeError) as error:  # the last: names in the file's metadata
            why = str(error).replace(str(self.path), self.name)
            raise self.refused(f"not a readable video ({type(error).__name__}: {why})") from error

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise self.refused(f"{width}x{height} is over the limit of {self.max_pixels} pixels")

    def _stamps(self, container: Any, stream: Any, stamps: Sequence[tuple[int | None, int]]) -> Stamps:
        shown = [stamp for stamp in stamps if not _is_hidden(container, stamp[0])]
        if not shown:
            raise self.refused("the video has no frames")
        rates = tuple(rate for rate in (stream.average_rate, stream.base_rate) if rate and rate > 0)
        return Stamps(tuple(pts for pts, _ in shown), shown[-1][1], stream.time_base or Fraction(1), rates)

    def _picture(self, frame: Any, aspect: Fraction) -> Image.Image:
        """The frame with square pixels, upright, in RGB. `aspect`: width by height of a stored pixel."""
        width = max(round(frame.width * aspect), 1)
        self._check_size(width, frame.height)
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"))
        else:
            image = frame.to_image()
        if width != frame.width:
            image = image.resize((width, frame.height))
        for turn in _turns(frame):
            image = image.transpose(turn)
        return image


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    """All packets of the streams (none: of all), and at the end an empty one of each, which ends its decoding."""
    try:
        for packet in container.demux(*streams):
            if packet.size or packet.dts is None:  # one that is empty before would end it too early
                yield packet
    except IndexError:  # PyAV, after all others, looks for the last packet of a stream that appeared on the way
        return


def _is_hidden(container: Any, pts: int | None) -> bool:
    """Whether an edit list hides a frame: FFmpeg drops those of an MP4 by itself, not of one in fragments."""
    return pts is not None and pts < 0 and "mp4" in container.format.name


def _turns(frame: Any) -> list[Image.Transpose]:
    """What brings a frame upright, by its display matrix; of a matrix that is askew the nearest quarter turn."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no name for another kind of side data, such as EXIF
        turns = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
        quarters = round(frame.rotation / 90) % 4  # counterclockwise
        return turns[quarters - 1 : quarters] if quarters else []
    if found is None:
        return []
    # Column x, row y of what is stored go to column a x + c y, row b x + d y of what is shown.
    a, b, _, c, d = struct.unpack("=5i", bytes(found)[:20])
    turns = []
    if abs(b) + abs(c) > abs(a) + abs(d):
        turns.append(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        turns.append(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        turns.append(Image.Transpose.FLIP_TOP_BOTTOM)
    return turns
