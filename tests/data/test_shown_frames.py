# SPDX-License-Identifier: Apache-2.0
"""The frames of a clip are those that a player shows, as it shows them."""

import io
import struct
from fractions import Fraction
from unittest.mock import Mock

import av
import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data import video
from embedrl_verl.data.video import FrameTimes, even_indices, read_video
from embedrl_verl.errors import MediaError
from tests.data.clips import box, boxes, change_box, numbers, read, remux, shift, write_clip

GREEN = (0, 255, 0)


def mux_with_cover(path, codec, size):
    """A clip (or sound, by the codec) with a green cover picture."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=24 if codec == "libx264" else 48000)
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = size, size, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        green = av.VideoFrame.from_image(Image.new("RGB", (size, size), GREEN)).reformat(format="yuvj420p")
        if codec == "libx264":
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            frames = [np.full((64, 96, 3), 5 * index, np.uint8) for index in range(48)]
            packets = [p for frame in frames for p in stream.encode(av.VideoFrame.from_ndarray(frame))]
        else:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 48000
            packets = stream.encode(sound)
        out.mux([*cover.encode(green), *packets, *stream.encode()])
    return path


def test_a_cover_picture_is_no_clip_wherever_it_stands(tmp_path):
    """The first stream in the file, or the largest."""
    picture = io.BytesIO()
    Image.new("RGB", (200, 200), GREEN).save(picture, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), picture.getvalue()))
    handler = box(b"hdlr", b"\0" * 8 + b"mdirappl" + b"\0" * 9)
    udta = box(b"udta", box(b"meta", b"\0" * 4, handler, box(b"ilst", cover)))

    def put_first(moov):
        parts = dict(boxes(moov))
        return box(b"mvhd", parts[b"mvhd"]) + udta + box(b"trak", parts[b"trak"])

    plain = write_clip(tmp_path / "plain.mp4").read_bytes()
    (tmp_path / "first.mp4").write_bytes(change_box(plain, (b"moov",), put_first))
    with av.open(str(tmp_path / "first.mp4")) as container:
        assert container.streams.video[0].width == 200
    for path in (tmp_path / "first.mp4", mux_with_cover(tmp_path / "large.mp4", "libx264", 400)):
        frames, times = read(path)
        assert (len(frames), frames[0].size, times.total) == (4, (96, 64), 48)
        assert numbers(frames) == [0, 16, 31, 47]


def test_a_file_with_a_cover_picture_alone_is_no_video(tmp_path):
    with pytest.raises(MediaError, match=r"'song\.mp4': the file has no video stream, only a cover picture"):
        read(mux_with_cover(tmp_path / "song.mp4", "aac", 200))


def test_of_two_streams_the_larger_is_the_clip(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        streams = [out.add_stream("mpeg4", rate=24) for _ in range(2)]
        for stream, width in zip(streams, (32, 96), strict=True):
            stream.width = stream.height = width
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(np.zeros((stream.height, stream.width, 3), np.uint8))
            out.mux([*stream.encode(frame), *stream.encode()])
    assert read(tmp_path / "two.mkv")[0][0].size == (96, 96)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+delay_moov"])
@pytest.mark.parametrize("start", [1, 14, 30])
def test_what_an_edit_list_hides_at_the_start_is_not_shown(tmp_path, start, movflags):
    """A cut in a group of pictures keeps packets from its key frame on; at 30 the file has 24 that none needs."""
    cut = shift(write_clip(tmp_path / "whole.mp4"), tmp_path / "cut.mp4", start, movflags=movflags)
    frames, times = read(cut)
    shown = 48 - start
    assert numbers(frames) == [start + index for index in even_indices(shown, 4)]
    assert times.indices == tuple(even_indices(shown, 4)) and (times.total, times.rate) == (shown, 24.0)


@pytest.mark.parametrize(
    ("edits", "shown"),
    [
        ([(0, 24)], list(range(24))),
        ([(10, 12), (30, 8)], [*range(10, 22), *range(30, 38)]),
        ([(-1, 24), (12, 30)], list(range(12, 42))),
    ],
)
def test_edits_are_shown_one_after_the_other(tmp_path, edits, shown):
    """(first frame, frames) of each; -1: nothing is shown."""
    whole = write_clip(tmp_path / "whole.mp4")
    with av.open(str(whole)) as container:
        frame = int(Fraction(1, 24) / container.streams.video[0].time_base)
    lines = b"".join(
        struct.pack(">IiI", 1000 * frames // 24, -1 if start < 0 else (start + 2) * frame, 0x10000)
        for start, frames in edits  # 2: stamps of the media begin there, for pictures that come out of order
    )
    edit_list = struct.pack(">II", 0, len(edits)) + lines
    data = change_box(whole.read_bytes(), (b"moov", b"trak", b"edts", b"elst"), lambda old: edit_list)
    (tmp_path / "edited.mp4").write_bytes(data)
    frames, _ = read_video(tmp_path / "edited.mp4", "edited.mp4", 1000.0, len(shown), 10**8)
    assert numbers(frames) == shown


def hide(show, hidden):
    """A bit of the first byte says that a picture of VP8 or VP9 is shown."""

    def change(index, content):
        if index and index % 5 == 0 and index <= 5 * hidden:
            content[0] ^= show

    return change


@pytest.mark.parametrize(
    ("codec", "kind", "show", "hidden", "decoded"),
    [
        ("libvpx", "webm", 0x10, 1, 1),
        ("libvpx", "webm", 0x10, 9, 1),
        ("libvpx-vp9", "avi", 0x02, 1, 2),  # packets do not tell; WebM has them in one packet with the next picture
    ],
)
def test_pictures_that_are_never_shown_do_not_count(tmp_path, monkeypatch, codec, kind, show, hidden, decoded):
    whole = write_clip(tmp_path / "all.webm", codec)
    clip = remux(whole, tmp_path / f"hidden.{kind}", hide(show, hidden))
    with av.open(str(clip)) as container:
        stamps = [frame.pts * frame.time_base * 1000 for frame in container.decode(video=0)]
    assert len(stamps) == 48 - hidden
    decode = Mock(side_effect=video._Clip.decode)
    monkeypatch.setattr(video._Clip, "decode", lambda *arguments: decode(*arguments))
    frames, times = read(clip)
    assert times.rate == 1000.0 and times.indices == tuple(even_indices(round(stamps[-1] - stamps[0]) + 1, 4))
    assert times.total == pytest.approx(2000, abs=2) and len(frames) == 4
    assert decode.call_count == decoded


def test_a_clip_whose_frames_come_out_of_order_is_decoded_once(tmp_path, monkeypatch):
    clip = write_clip(
        tmp_path / "a.mp4", pts=[20 * index + index**2 // 20 for index in range(48)], tick=Fraction(1, 1000)
    )
    decode = Mock(side_effect=video._Clip.decode)
    monkeypatch.setattr(video._Clip, "decode", lambda *arguments: decode(*arguments))
    assert read(clip)[1].rate == 1000.0 and decode.call_count == 1


def test_a_clip_of_which_far_fewer_frames_come_than_packets_is_refused(tmp_path):
    clip = remux(write_clip(tmp_path / "all.webm", "libvpx-vp9"), tmp_path / "a.avi", hide(0x02, 9))
    with pytest.raises(MediaError, match=r"'a\.avi': only 39 of 48 frames can be decoded"):
        read(clip)


@pytest.mark.parametrize("interlaced", [True, False])
def test_two_packets_may_make_one_interlaced_frame(tmp_path, interlaced):
    """Broadcasts have a packet a field. Here every other one has no picture."""

    def setup(stream):
        stream.options = {"g": "1", **({"flags": "+ildct+ilme"} if interlaced else {})}

    def empty(index, content):
        if index % 2:
            content[:] = b"\0\0\1\xb2none"

    clip = remux(write_clip(tmp_path / "a.avi", "mpeg2video", setup=setup), tmp_path / "b.avi", empty)
    if interlaced:
        assert read(clip)[1] == FrameTimes(12.0, (0, 8, 15, 23), 24)
    else:
        with pytest.raises(MediaError, match="only 24 of 48 frames can be decoded"):
            read(clip)


SEEN = {
    (0, False, False): [],
    (90, False, False): [Image.Transpose.ROTATE_90],
    (180, False, False): [Image.Transpose.ROTATE_180],
    (-90, False, False): [Image.Transpose.ROTATE_270],
    (0, True, False): [Image.Transpose.FLIP_LEFT_RIGHT],
    (0, False, True): [Image.Transpose.FLIP_TOP_BOTTOM],
    (90, True, False): [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT],
    (-90, True, False): [Image.Transpose.ROTATE_270, Image.Transpose.FLIP_LEFT_RIGHT],
    (84, False, False): [Image.Transpose.ROTATE_90],
    (-5, False, False): [],
}


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize(("degrees", "mirrored", "flipped"), list(SEEN))
def test_a_clip_stands_upright(tmp_path, degrees, mirrored, flipped, kind):
    stored = Image.new("RGB", (96, 64))
    for number, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))):
        left, top = 48 * (number % 2), 32 * (number // 2)
        stored.paste(colour, (left, top, left + 48, top + 32))
    path = tmp_path / f"turned.{kind}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(degrees, hflip=mirrored, vflip=flipped)
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_image(stored)))
        out.mux(stream.encode())
    seen = stored
    for turn in SEEN[degrees, mirrored, flipped]:
        seen = seen.transpose(turn)
    (first, *others), _ = read(path)
    assert {frame.size for frame in (first, *others)} == {seen.size}
    assert np.abs(np.asarray(first, float) - np.asarray(seen, float)).mean() < 8


def test_a_track_header_that_turns_right_puts_the_top_at_the_right(tmp_path):
    one = 0x10000
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)
    data = write_clip(tmp_path / "plain.mp4").read_bytes()
    data = change_box(data, (b"moov", b"trak", b"tkhd"), lambda body: body[:40] + matrix + body[76:])
    (tmp_path / "turned.mp4").write_bytes(data)
    frames, _ = read(tmp_path / "turned.mp4")
    red, green, blue = frames[0].getpixel((60, 48))
    assert frames[0].size == (64, 96) and red > 200 and max(green, blue) < 60


def test_a_picture_with_exif_is_turned_as_a_clip_too(tmp_path):
    stored = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    for orientation, turn in ((3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")):
        tags = Image.Exif()
        tags[274] = orientation
        stored.save(tmp_path / "still.mjpeg", "JPEG", exif=tags, quality=95)
        seen = np.asarray(stored.transpose(Image.Transpose[turn]), float)
        assert np.abs(np.asarray(read(tmp_path / "still.mjpeg")[0][0], float) - seen).mean() < 3


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 128), (Fraction(1, 2), 48), (Fraction(1000, 1001), 96)])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_pixels_are_square(tmp_path, kind, aspect, width):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    clip = write_clip(tmp_path / f"wide.{kind}", setup=setup)
    frames, _ = read(clip)
    assert frames[0].size == (width, 64) and numbers(frames) == [0, 16, 31, 47]
    if width > 96:
        with pytest.raises(MediaError, match="128x64 is over the limit of 8000 pixels"):
            read(clip, max_pixels=8000)
    else:
        with pytest.raises(MediaError, match="96x64 is over the limit of 6000 pixels"):
            read(clip, max_pixels=6000)
    turned = write_clip(tmp_path / f"turned.{kind}", setup=lambda s: (setup(s), s.set_display_rotation(90))[0])
    assert read(turned)[0][0].size == (64, width)


def test_frames_of_a_clip_that_changes_its_size_have_the_first_ones(tmp_path):
    parts = [write_clip(tmp_path / f"{width}.h264", size=(width, 64)) for width in (96, 128, 64)]
    (tmp_path / "all.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, times = read(tmp_path / "all.h264")
    assert times.total == 144 and {frame.size for frame in frames} == {(96, 64)}
    assert numbers(frames) == [index % 48 for index in times.indices]
    with pytest.raises(MediaError, match="128x64 is over the limit of 8000 pixels"):
        read(tmp_path / "all.h264", 40, max_pixels=8000)
    huge = write_clip(tmp_path / "400.h264", size=(400, 400)).read_bytes()
    (tmp_path / "all.h264").write_bytes(parts[0].read_bytes() + huge)
    with pytest.raises(MediaError, match="not a readable video"):  # by the decoder, before it takes the memory
        read(tmp_path / "all.h264", max_pixels=8000)


def gif(path):
    frames = [Image.new("RGBA", (96, 64)) for _ in range(4)]
    for frame in frames:
        frame.paste((255, 0, 0, 255), (48, 0, 96, 64))
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)


def with_alpha(codec, pixels):
    def write(path):
        picture = np.zeros((64, 96, 4), np.uint8)
        picture[..., 0], picture[:, 48:, 3] = 255, 255
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
            out.mux([*stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")), *stream.encode()])

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.gif", gif),
        ("a.mov", with_alpha("qtrle", "argb")),
        ("a.avi", with_alpha("ffv1", "yuva420p")),
        ("a.nut", with_alpha("png", "rgba")),
    ],
)
def test_what_is_transparent_in_a_clip_is_white(tmp_path, name, write):
    write(tmp_path / name)
    frames, _ = read(tmp_path / name)
    assert frames[0].getpixel((10, 10)) == (255, 255, 255)
    assert np.abs(np.array(frames[0].getpixel((80, 50))) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("deep.mkv", "ffv1", "yuv420p10le"), ("grey.mkv", "libx264", "gray"), ("full.avi", "mjpeg", "yuvj444p")],
)
def test_every_pixel_format_becomes_rgb(tmp_path, name, codec, pixels):
    frames, _ = read(write_clip(tmp_path / name, codec, pixels=pixels))
    assert frames[0].mode == "RGB"
    assert np.abs(np.array(numbers(frames)) - [0, 16, 31, 47]).max() <= (4 if pixels == "gray" else 1)
