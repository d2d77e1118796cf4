# SPDX-License-Identifier: Apache-2.0
"""Times and rates of a clip are those of its time stamps."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from embedrl_verl.data.video import MAX_SECONDS, FrameTimes, Stamps, check_length, list_times
from embedrl_verl.errors import MediaError
from tests.data.clips import numbers, read, write_clip

NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("rate", [Fraction(30), NTSC, Fraction(24000, 1001), Fraction(25, 2), Fraction(60)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts", "a.avi"])
def test_a_constant_rate_is_exact_whatever_the_time_base_rounds(tmp_path, name, rate):
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    _, times = read(write_clip(tmp_path / name, codec, rate=rate, pts=range(75)), 6)
    assert times.rate == pytest.approx(float(rate), rel=1e-12 if name != "a.ts" else 1e-5)
    assert times.indices[0] == 0 and times.indices[-1] == 74 and times.total == 75
    assert times.fps == pytest.approx(len(times.indices) / 75 * float(rate), rel=1e-5)


def test_ten_seconds_at_30_a_second_have_the_times_of_their_frames(tmp_path):
    frames, times = read(write_clip(tmp_path / "a.mp4", rate=30, pts=range(300)), 8)
    assert times.indices == (0, 43, 85, 128, 171, 214, 256, 299)
    assert times.seconds == pytest.approx([index / 30 for index in times.indices])
    assert times.fps == pytest.approx(0.8) and len(frames) == 8


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_varying_rate_is_told_in_milliseconds(tmp_path, name):
    """One second at 40 a second, a long picture, and the rest at 10 a second; it does not begin at 0."""
    pts = [500 + 25 * index for index in range(20)] + [3000 + 100 * index for index in range(20)]
    codec = "libvpx" if name == "a.webm" else "libx264"
    frames, times = read(write_clip(tmp_path / name, codec, pts=pts, tick=Fraction(1, 1000)), 8)
    assert times.rate == 1000.0 and times.indices == (0, 629, 1257, 1886, 2514, 3143, 3771, 4400)
    assert numbers(frames) == [0, 19, 19, 19, 20, 26, 32, 39], "what is on the screen at those times"
    assert 4400 < times.total <= 4500 and times.fps == pytest.approx(8 / 4.45, rel=0.02)


def test_a_picture_that_is_left_out_keeps_its_time(tmp_path):
    """A tick of an AVI is a frame: capture programs drop some."""
    shown = [index for index in range(40) if not 10 <= index < 20]
    frames, times = read(write_clip(tmp_path / "a.avi", "mpeg4", rate=25, pts=shown), 8)
    assert times.rate == 1000.0 and times.total == 1600 and times.indices == (0, 520, 1040, 1560)
    assert np.abs(np.subtract(numbers(frames), [0, 9, 16, 29])).max() <= 1, "of the times 0, 13, 26 and 39"
    single = [index for index in range(40) if index != 20]
    assert read(write_clip(tmp_path / "b.avi", "mpeg4", rate=25, pts=single), 8)[1].rate == 1000.0


MS = Fraction(1, 1000)


@pytest.mark.parametrize(
    ("pts", "rates", "rate"),
    [
        ((0, 33, 67, 100), (NTSC,), 29.97002997002997),
        ((0, 33, 67, 100), (Fraction(25),), 30.0),
        ((0, 33, 67, 100), (), 30.0),
        ((7,), (Fraction(25),), 25.0),
        ((7,), (), 2.0),
        ((None, None, None), (Fraction(50),), 50.0),
        ((0, None, 80), (Fraction(25),), 25.0),
        ((80, 40, 0), (Fraction(25),), 25.0),
        ((0, 80, 40, 120), (Fraction(25),), 25.0),
        ((5, 5, 5), (Fraction(25),), 25.0),
        ((0, 40, 40, 80), (Fraction(25),), 1000.0),
        ((0, 40, 85, 120), (Fraction(25),), 1000.0),
        ((0, 41, 79, 120), (Fraction(25),), 25.0),
    ],
)
def test_a_claimed_rate_counts_where_it_fits_or_nothing_else_is_there(pts, rates, rate):
    wanted, times = Stamps(pts, 40, MS, rates).sample(1000.0, 100)
    assert times.rate == pytest.approx(rate)
    assert len(wanted) == len(times.indices) and times.indices[-1] < times.total


def test_the_last_frame_of_unknown_length_lasts_as_the_one_before():
    assert Stamps((0, 10, 110, 130), 0, MS, ()).sample(2.0, 8)[1].total == 150
    assert Stamps((0, 10, 110, 130), 300, MS, ()).sample(2.0, 8)[1].total == 430


def test_frames_are_drawn_evenly_in_time_however_they_cluster(tmp_path):
    """Thirty pictures a second apart, then six seconds at 50 a second."""
    pts = [1000 * index for index in range(30)] + [30000 + 20 * index for index in range(300)]
    _, times = read(write_clip(tmp_path / "a.mkv", pts=pts, tick=MS), 8)
    gaps = [right - left for left, right in pairwise(times.indices)]
    assert max(gaps) - min(gaps) <= 1 and times.indices[-1] == pts[-1]
    assert times.fps == pytest.approx(8 / 36, rel=1e-3)


@pytest.mark.parametrize(
    "times",
    [list_times(1 / 3600, 13), FrameTimes(1000.0, (0, 10**9), 10**9), FrameTimes(30.0, (0,), 30 * (MAX_SECONDS + 1))],
    ids=["hourly pictures", "a jump of the stamps", "a film"],
)
def test_a_clip_of_more_than_half_a_day_is_refused(times):
    check_length(list_times(1 / 3600, 12), "clip")
    with pytest.raises(MediaError, match=r"clip: a clip may be 12 hours long; .* hours. Cut it"):
        check_length(times, "clip")


def test_a_padded_sample_has_the_rate_that_it_had():
    times = FrameTimes(30.0, (0, 40, 80), 90)
    assert times.padded(3) is times
    assert times.padded(4) == FrameTimes(30.0, (0, 40, 80, 80), 120) and times.padded(4).fps == times.fps == 1.0
