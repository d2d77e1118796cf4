# SPDX-License-Identifier: Apache-2.0
"""Damaged clips through the video reader: each gives frames or a MediaError, in bounded time and memory.

    nice -n 10 python benchmarks/fuzz_video.py [--clips 10000] [--seed 0] [--keep DIR]

Makes one small sound clip of each kind (H.264 in MP4 plain, turned, with an edit list, in fragments, with a cover
picture; H.264 in Matroska and MPEG-TS; VP8 and VP9 in WebM; MPEG-4 in AVI; GIF), damages copies of them in a way that
depends on seed and number alone, and reads them with `read_video` in one worker process, which is started again when it
crashes or hangs. Prints what came of them. The exit code is 1 when one crashed, hung (20 s), raised anything else (4
GiB are all that it gets), or gave frames that break the contract; `--keep` saves those.
"""

from __future__ import annotations

import argparse
import collections
import io
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 20.0
MEMORY = 4 << 30
FRAMES, WIDTH, HEIGHT, RATE = 48, 96, 64, 24


def sound_clips() -> dict[str, bytes]:
    """One clip of each kind."""
    plain = encode("mp4", "libx264")
    edit = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    return {
        "mp4": plain,
        "mp4 header first": encode("mp4", "libx264", {"movflags": "faststart"}),
        "mp4 turned": encode("mp4", "libx264", turn=90),
        "mp4 edit list": shifted(plain, edit),
        "mp4 fragments": shifted(plain, {**edit, "movflags": "frag_keyframe+delay_moov"}),
        "mp4 cover": encode("mp4", "libx264", cover=True),
        "mkv": encode("matroska", "libx264", turn=180),
        "ts": encode("mpegts", "libx264"),
        "webm vp8": encode("webm", "libvpx"),
        "webm vp9": encode("webm", "libvpx-vp9"),
        "avi": encode("avi", "mpeg4"),
        "gif": encode("gif", "gif", pixels="rgb8"),
    }


def encode(
    kind: str,
    codec: str,
    options: dict[str, str] | None = None,
    turn: int = 0,
    pixels: str = "yuv420p",
    cover: bool = False,
) -> bytes:
    """A small moving clip."""
    import av

    options = {"fflags": "+bitexact", **(options or {})}  # no random ids
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=kind, options=options) as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.thread_count = 1  # the same clip each time
        if turn:
            stream.set_display_rotation(turn)
        if cover:
            picture_stream = out.add_stream("mjpeg", rate=1)
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 200, 200, "yuvj420p"
            picture_stream.disposition = av.stream.Disposition.attached_pic
            out.mux(picture_stream.encode(av.VideoFrame.from_ndarray(np.zeros((300, 200), np.uint8), "yuvj420p")))
        for index in range(FRAMES):
            picture = np.full((HEIGHT, WIDTH, 3), 5 * index, np.uint8)
            picture[:8], picture[20:30, index : index + 20] = (255, 0, 0), (0, 0, 255)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
        out.close()
        return Path(file.name).read_bytes()


def shifted(clip: bytes, options: dict[str, str]) -> bytes:
    """The clip without its first 14 frames, cut without encoding it again."""
    import av

    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(buffer, "w", format="mp4", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                back = int(Fraction(14, RATE) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, stream
                out.mux(packet)
    return buffer.getvalue()


def place(data: bytearray, dice: random.Random) -> int:
    """Half of all damage hits the first or the last 2 KiB, where headers are."""
    near = dice.randrange(min(2048, len(data)))
    return dice.choice([near, len(data) - 1 - near, dice.randrange(len(data)), dice.randrange(len(data))])


def flip_bits(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        data[place(data, dice)] ^= 1 << dice.randrange(8)


def truncate(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def swap_blocks(data: bytearray, dice: random.Random) -> None:
    size = dice.choice([4, 16, 256])
    one, other = place(data, dice), place(data, dice)
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def change_size(data: bytearray, dice: random.Random) -> None:
    """A number of four bytes, where a name of a box follows if there is one."""
    boxes = [at - 4 for name in NAMES for at in found(data, name)]
    at = dice.choice(boxes) if boxes and dice.random() < 0.7 else place(data, dice)
    (old,) = struct.unpack(">I", (data[at : at + 4] + b"\0" * 4)[:4])
    new = dice.choice([0, 1, 7, 8, old + 1, old - 1, 2 * old, 0x7FFFFFFF, 0xFFFFFFFF, dice.getrandbits(32)])
    data[at : at + 4] = struct.pack(">I", new & 0xFFFFFFFF)


def change_entry(data: bytearray, dice: random.Random) -> None:
    """A number in a table of an MP4: sizes, places, durations, edits, the matrix."""
    tables = [at for name in NAMES for at in found(data, name)]
    at = (dice.choice(tables) + 4 + 4 * dice.randrange(20)) if tables else place(data, dice)
    data[at : at + 4] = struct.pack(">I", dice.choice([0, 1, 0x10000, 0x7FFFFFFF, 0x80000000, dice.getrandbits(32)]))


def overwrite(data: bytearray, dice: random.Random) -> None:
    at, size = place(data, dice), dice.choice([1, 4, 64, 1024])
    data[at : at + size] = dice.choice([b"\0" * size, b"\xff" * size, dice.randbytes(size)])


def remove_or_repeat(data: bytearray, dice: random.Random) -> None:
    at, size = place(data, dice), dice.choice([1, 4, 64, 1024])
    data[at : at + size] = data[at : at + size] * dice.choice([0, 2])


NAMES = (b"moov", b"mvhd", b"trak", b"tkhd", b"elst", b"mdia", b"mdhd", b"stbl", b"stsd", b"avc1", b"avcC", b"stts",
         b"ctts", b"stsc", b"stsz", b"stco", b"stss", b"moof", b"traf", b"tfhd", b"tfdt", b"trun", b"mdat",
         b"avih", b"strh", b"strf", b"movi", b"idx1")  # fmt: skip
DAMAGE: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits, truncate, swap_blocks, change_size, change_entry, overwrite, remove_or_repeat,
)  # fmt: skip


def found(data: bytearray, name: bytes) -> list[int]:
    """Places of a name."""
    places, at = [], data.find(name)
    while at >= 4:
        places.append(at)
        at = data.find(name, at + 1)
    return places


def damaged(clips: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Kind and content of clip `number`."""
    dice = random.Random(f"{seed} {number}")
    kind = dice.choice(sorted(clips))
    data = bytearray(clips[kind])
    for damage in dice.choices(DAMAGE, k=dice.choice([1, 1, 1, 2, 4])):
        if data:
            damage(data, dice)
    return kind, bytes(data)


def outcome(path: Path) -> str:
    """What comes of one clip."""
    from embedrl_verl.data.media import MAX_PIXELS
    from embedrl_verl.data.video import read_video
    from embedrl_verl.errors import MediaError

    try:
        frames, times = read_video(path, path.name, 2.0, 8, MAX_PIXELS)
    except MediaError:
        return "refused"
    except Exception:
        return "BAD " + traceback.format_exc().strip().replace("\n", " | ")
    indices = times.indices
    whole = len(frames) == len(indices) and 1 <= len(frames) <= 8 and len({frame.size for frame in frames}) == 1
    ordered = indices[0] == 0 and list(indices) == sorted(indices) and indices[-1] < times.total
    return "frames" if whole and ordered and times.fps > 0 else f"BAD contract: {len(frames)} frames, {times}"


def work(arguments: argparse.Namespace) -> None:
    """Reads clips `first` to `clips`; a line for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = Path(arguments.folder)
    clips = {file.name: file.read_bytes() for file in folder.glob("sound/*")}
    for number in range(arguments.first, arguments.clips):
        kind, content = damaged(clips, arguments.seed, number)
        path = folder / "clip"
        path.write_bytes(content)
        started = time.monotonic()
        result = outcome(path)
        print(f"{number}\t{kind}\t{time.monotonic() - started:.3f}\t{peak()}\t{result}", flush=True)


def peak() -> int:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    parser.add_argument("--keep", type=Path, help="folder for the clips that failed")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        clips = sound_clips()
        (Path(folder) / "sound").mkdir()
        for kind, content in clips.items():
            (Path(folder) / "sound" / kind).write_bytes(content)
        return supervise(arguments, folder, clips)


def supervise(arguments: argparse.Namespace, folder: str, clips: dict[str, bytes]) -> int:
    """Runs workers until all clips are read; prints the result."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    number, slowest, memory, started = arguments.first, (0.0, 0), 0, time.monotonic()
    while number < arguments.clips:
        command = [
            sys.executable,
            __file__,
            "--folder",
            folder,
            "--first",
            str(number),
            "--clips",
            str(arguments.clips),
        ]
        with subprocess.Popen(
            [*command, "--seed", str(arguments.seed)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        ) as worker:
            for line in lines(worker):
                _, kind, seconds, size, result = line.rstrip("\n").split("\t", 4)
                slowest, memory = max(slowest, (float(seconds), number)), max(memory, int(size))
                record(arguments, clips, counts, number, kind, result)
                number += 1
            code = worker.wait()
        if number < arguments.clips:
            result = f"BAD {'hung' if code == -9 else f'crashed, exit code {code}'}"
            record(arguments, clips, counts, number, damaged(clips, arguments.seed, number)[0], result)
            number += 1
    for kind in sorted(counts):
        print(f"{kind:18}", ", ".join(f"{result} {count}" for result, count in sorted(counts[kind].items())))
    total = sum(counts.values(), collections.Counter())
    print(f"total: {dict(total)}; slowest {slowest[0]:.2f} s (clip {slowest[1]}); peak {memory} MiB; "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    return int(total["bad"] > 0)


def lines(worker: Any) -> Any:
    """The lines of a worker until it ends; it is killed when none comes in time."""
    while select.select([worker.stdout], [], [], SECONDS + 10)[0]:  # 10 s to start
        line = worker.stdout.readline()
        if not line:
            return
        yield line.decode()
    worker.kill()


def record(
    arguments: argparse.Namespace,
    clips: dict[str, bytes],
    counts: dict[str, collections.Counter[str]],
    number: int,
    kind: str,
    result: str,
) -> None:
    is_bad = result.startswith("BAD")
    counts[kind]["bad" if is_bad else result] += 1
    if is_bad:
        print(f"clip {number} ({kind}): {result}", flush=True)
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            (arguments.keep / f"{number}_{kind.replace(' ', '_')}").write_bytes(
                damaged(clips, arguments.seed, number)[1]
            )


if __name__ == "__main__":
    sys.exit(main())
