# SPDX-License-Identifier: Apache-2.0
"""Small clips for tests: frame k has grey level 5 k and a red band at its top."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from embedrl_verl.data.video import FrameTimes, read_video


def write_clip(
    path: Path,
    codec: str = "libx264",
    *,
    pts: Iterable[int] = range(48),
    tick: Fraction | None = None,
    rate: Fraction | int = 24,
    size: tuple[int, int] = (96, 64),
    pixels: str = "yuv420p",
    setup: Callable[[Any], None] = lambda stream: None,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip with the time stamps `pts` in units of `tick` (None: a frame at `rate`)."""
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if "264" in codec:
            stream.options = {"g": "24", "bf": "2", "crf": "1", "sc_threshold": "0"}
        if codec.startswith("libvpx"):
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "1M"}
        if tick:
            stream.codec_context.time_base = tick
        setup(stream)
        for index, stamp in enumerate(pts):
            picture = np.full((size[1], size[0], 3), 5 * index % 256, np.uint8)
            picture[: size[1] // 8] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, tick or 1 / Fraction(rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def read(path: Path, max_frames: int = 8, max_pixels: int = 10**8) -> tuple[tuple[Image.Image, ...], FrameTimes]:
    """Sampled at 2 frames a second."""
    return read_video(path, path.name, 2.0, max_frames, max_pixels)


def numbers(frames: Iterable[Image.Image]) -> list[int]:
    """Which frames of the clip they are, by their lower halves."""
    return [round(float(np.asarray(frame)[frame.height // 2 :].mean()) / 5) for frame in frames]


def shift(source: Path, target: Path, frames: int, rate: int = 24, **options: str) -> Path:
    """The clip from frame `frames` on, cut without encoding it again: its lead-in is there, and hidden."""
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1", **options}
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.pts is not None and packet.dts is not None:
                back = int(Fraction(frames, rate) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, stream
                new.mux(packet)
    return target


def remux(source: Path, target: Path, change: Callable[[int, bytearray], None]) -> Path:
    """The clip with the content of its packets changed in place."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(old.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                change(index, content)
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                new.mux(copy)
    return target


def box(kind: bytes, *bodies: bytes) -> bytes:
    """A box of an MP4."""
    body = b"".join(bodies)
    return struct.pack(">I", 8 + len(body)) + kind + body


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of each box."""
    while data:
        (length,) = struct.unpack(">I", data[:4])
        yield data[4:8], data[8:length]
        data = data[length:]


def change_box(data: bytes, path: tuple[bytes, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The boxes with the body at `path` changed. No offset changes while mdat stands before moov."""
    return b"".join(
        box(kind, (change(body) if len(path) == 1 else change_box(body, path[1:], change)) if kind == path[0] else body)
        for kind, body in boxes(data)
    )
