# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data import media, video
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import Item, Video
from embedrl_verl.data.video import even_indices, sample_count
from embedrl_verl.errors import MediaError
from tests.data import clips


def write_clip(path, frames, **options):
    """A clip of 10 frames a second whose frame k has grey level 5k."""
    clips.write_clip(path, "mpeg4", pts=range(frames), rate=10, size=(64, 64), options=options)


@pytest.mark.parametrize(
    ("total", "native", "fps", "limit", "count"),
    [(300, 30, 2, 768, 20), (50, 25, 2, 768, 4), (10000, 25, 2, 768, 768), (5, 25, 2, 768, 4), (300, 30, 2, 8, 8)],
)
def test_number_of_frames_is_that_of_the_public_sampler(total, native, fps, limit, count):
    assert sample_count(total, native, fps, limit) == count


def test_short_clips_and_small_limits_still_give_a_frame_and_indices_are_even():
    assert [sample_count(total, 25, 2, 8) for total in (1, 2, 3)] == [1, 2, 2]
    assert sample_count(100, 25, 2, 1) == 1
    assert even_indices(40, 8) == [0, 6, 11, 17, 22, 28, 33, 39] and even_indices(3, 1) == [0]


def test_file_is_sampled_over_its_whole_length(tmp_path):
    write_clip(tmp_path / "clip.mp4", frames=40)
    loaded = load_item(Item(video=Video(path="clip.mp4", fps=2.0)), tmp_path)
    assert np.allclose(clips.numbers(loaded.frames), even_indices(40, 8), atol=1.0)
    assert loaded.times.fps == pytest.approx(2.0)
    assert loaded.frames[0].size == (64, 64)


def test_empty_video_is_an_error(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(MediaError, match=r"'empty\.mp4': not a readable video"):
        load_item(Item(video=Video(path="empty.mp4")), tmp_path)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(MediaError, match="no video stream"):
        load_item(Item(video=Video(path="sound.wav")), tmp_path)


@pytest.mark.parametrize(
    ("header_first", "reason"), [(False, "(no video stream|not a readable video)"), (True, "ends early")]
)
def test_truncated_video_is_an_error(tmp_path, header_first, reason):
    write_clip(tmp_path / "clip.mp4", 40, **({"movflags": "faststart"} if header_first else {}))
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(MediaError, match=rf"'cut\.mp4': .*{reason}"):
        load_item(Item(video=Video(path="cut.mp4")), tmp_path)


def test_a_truncated_webm_is_an_error_by_its_length(tmp_path):
    """It does not count its frames; a clip without a length, as browsers record it, is read as far as it goes."""
    whole = clips.write_clip(tmp_path / "whole.webm", "libvpx").read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"ends early; it has [\d.]+ of 2\.0 seconds"):
        clips.read(tmp_path / "cut.webm")
    length = whole.index(b"\x44\x89\x88")  # Duration, an element of 8 bytes; EC: nothing
    (tmp_path / "live.webm").write_bytes(whole[:length] + b"\xec\x89\x00" + whole[length + 3 : len(whole) // 2])
    assert 10 < clips.read(tmp_path / "live.webm")[1].total < 40


def test_a_damaged_middle_is_an_error(tmp_path):
    """Of an MP4 whose packets are there, but most can not be decoded."""

    def spoil(index, content):
        if index >= 10:
            content[5:] = bytes(len(content) - 5)

    whole = clips.write_clip(tmp_path / "whole.mp4")
    with pytest.raises(MediaError, match="not a readable video|can be decoded"):
        clips.read(clips.remux(whole, tmp_path / "spoilt.mp4", spoil))


def test_an_empty_packet_ends_nothing(tmp_path):
    whole = clips.write_clip(tmp_path / "whole.nut")
    clip = clips.remux(
        whole, tmp_path / "gaps.nut", lambda index, content: content.clear() if index in (5, 20) else None
    )
    assert clips.read(clip)[1].total == 2000


def test_a_stream_that_appears_on_the_way_ends_nothing(tmp_path, monkeypatch):
    """PyAV asks for its last packet in a list that was made before, if what lies in memory behind it is not 0."""
    clip = clips.write_clip(tmp_path / "a.ts")
    packets = video._packets

    class Late:
        def __init__(self, container):
            self.container = container

        def demux(self, *streams):
            yield from self.container.demux(*streams)
            raise IndexError("list index out of range")

    monkeypatch.setattr(video, "_packets", lambda container, *streams: packets(Late(container), *streams))
    assert clips.read(clip)[1].total == 48


@pytest.mark.parametrize(
    ("name", "codec", "known", "unknown"),
    [
        ("a.mp4", "libx264", b"avc1", b"zz99"),
        ("a.webm", "libvpx", b"V_VP8", b"V_ZZ9"),
        ("a.avi", "mpeg4", b"FMP4", b"zz99"),
        ("a.mov", "libx264", b"avc1", b"zz99"),
    ],
)
def test_an_unknown_codec_is_an_error(tmp_path, name, codec, known, unknown):
    whole = clips.write_clip(tmp_path / name, codec).read_bytes()
    (tmp_path / name).write_bytes(whole.replace(known, unknown))
    with pytest.raises(MediaError, match="its codec is unknown to this build of FFmpeg; encode the video as H.264"):
        clips.read(tmp_path / name)


def test_a_stream_of_a_known_codec_is_read_beside_one_that_is_not(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        streams = [out.add_stream(codec, rate=24) for codec in ("libvpx", "mpeg4")]
        for stream, width in zip(streams, (96, 32), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, width, "yuv420p"
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(np.zeros((stream.height, stream.width, 3), np.uint8))
            out.mux([*stream.encode(frame), *stream.encode()])
    assert clips.read(tmp_path / "two.mkv")[0][0].size == (96, 96)
    (tmp_path / "two.mkv").write_bytes((tmp_path / "two.mkv").read_bytes().replace(b"V_VP8", b"V_ZZ9"))
    assert clips.read(tmp_path / "two.mkv")[0][0].size == (32, 32)


def test_metadata_that_are_no_text_are_an_error(tmp_path):
    write_clip(tmp_path / "clip.mp4", frames=2)
    film = (tmp_path / "clip.mp4").read_bytes()
    assert b"Lavf" in film
    (tmp_path / "odd.mp4").write_bytes(film.replace(b"Lavf", b"\xff\xfevf", 1))
    with pytest.raises(MediaError, match=r"'odd\.mp4': not a readable video \(UnicodeDecodeError"):
        load_item(Item(video=Video(path="odd.mp4")), tmp_path)


def test_oversized_and_missing_videos_are_refused(tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4", frames=2)
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 64 - 1)
    for name, message in (("clip", "64x64 is over the limit of 4095 pixels"), ("gone", "no such file")):
        with pytest.raises(MediaError, match=message):
            load_item(Item(video=Video(path=f"{name}.mp4")), tmp_path)


@pytest.mark.nightly
def test_a_damaged_clip_gives_frames_or_an_error():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_video.py"
    run = subprocess.run(
        [sys.executable, script, "--clips", "1000", "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and "'frames': " in run.stdout and "'refused': " in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4", "i%d.png", "a.mpd", "a.sdp"])
def test_a_file_that_names_other_files_opens_none_of_them(tmp_path, name):
    """They may lie outside the media root."""
    outside = clips.write_clip(tmp_path / "secret.ts")
    clips.write_clip(tmp_path / "secret.mp4")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    for number in range(1, 9):
        Image.new("RGB", (64, 64)).save(root / f"i{number}.png")
    content = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{outside}\n#EXT-X-ENDLIST\n",
        "a.mp4": "ffconcat version 1.0\nfile link/secret.mp4\n",
        "a.mpd": f"<MPD><Period><AdaptationSet><BaseURL>{outside}</BaseURL></AdaptationSet></Period></MPD>",
        "a.sdp": "v=0\nm=video 5004 RTP/AVP 96\n",
        "i%d.png": "",
    }
    (root / name).write_text(content[name])
    with pytest.raises(MediaError, match="not a readable video"):
        load_item(Item(video=Video(path=name)), root)
