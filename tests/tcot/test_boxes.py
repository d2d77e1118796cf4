# SPDX-License-Identifier: Apache-2.0
"""Boxes land on the pixels that the Reasoner meant."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.tcot import Box, boxes_to_pixels

# One region of a 640x428 image, in every family's units: pixels of the original are (146, 137, 615, 415).
WIDTH, HEIGHT = 640, 428
RELATIVE = Box(228, 320, 961, 970)
ABSOLUTE, RESIZED = Box(147, 134, 619, 407), {"resized_width": 644, "resized_height": 420}


def test_reference_box_in_relative_units():
    pixels = boxes_to_pixels([RELATIVE], convention="relative_1000", width=WIDTH, height=HEIGHT)
    assert pixels == [(145, 136, 615, 415)]


def test_reference_box_in_pixels_of_the_resized_image():
    pixels = boxes_to_pixels([ABSOLUTE], convention="absolute", width=WIDTH, height=HEIGHT, **RESIZED)
    assert pixels == [(146, 136, 615, 414)]  # exact: 146.09, 136.55, 615.16, 414.75


def test_absolute_boxes_without_a_resized_size_are_pixels_of_the_original():
    assert boxes_to_pixels([[1, 2, 30, 40]], convention="absolute", width=64, height=48) == [(1, 2, 30, 40)]


def test_whole_values_convert_exactly():
    """290 / 1000 * 100 is 28.999999999999996 in floats."""
    assert boxes_to_pixels([[290, 570, 1000, 1000]], convention="relative_1000", width=100, height=100) == [
        (29, 57, 100, 100)
    ]


def test_boxes_are_clamped_to_the_image():
    boxes = [[-5, -1e308, 1e308, 2000], [900, 900, 1001, 1001]]
    assert boxes_to_pixels(boxes, convention="relative_1000", width=200, height=100) == [
        (0, 0, 200, 100),
        (180, 90, 200, 100),
    ]


@pytest.mark.parametrize(
    "box",
    [(5, 5, 5, 50), (50, 5, 5, 50), (5, 50, 50, 5), (1000, 0, 1100, 9), (-9, 0, 0, 9), (1, 1, 4, 900)],
    ids=["no width", "x reversed", "y reversed", "right of the image", "left of it", "under a pixel"],
)
def test_boxes_without_an_area_are_dropped_and_the_others_stay(box):
    pixels = boxes_to_pixels([box, [0, 0, 500, 500]], convention="relative_1000", width=100, height=100)
    assert pixels == [(0, 0, 50, 50)]


@given(
    st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 4), max_size=5),
    st.sampled_from(["relative_1000", "absolute"]),
    *[st.integers(1, 5000)] * 4,
)
def test_every_box_lies_inside_the_image(boxes, convention, width, height, resized_width, resized_height):
    sizes = {"width": width, "height": height, "resized_width": resized_width, "resized_height": resized_height}
    for x1, y1, x2, y2 in boxes_to_pixels(boxes, convention=convention, **sizes):
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@given(*[st.integers(1, 4000)] * 2, st.data())
def test_a_box_written_by_the_model_comes_back_within_a_unit(width, height, data):
    """Encoding rounds to 1/1000 of the side, decoding cuts to whole pixels."""
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    box = [round(x1 / width * 1000), round(y1 / height * 1000), round(x2 / width * 1000), round(y2 / height * 1000)]
    for pixels in boxes_to_pixels([box], convention="relative_1000", width=width, height=height):
        for pixel, true, size in zip(pixels, (x1, y1, x2, y2), (width, height) * 2, strict=True):
            assert abs(pixel - true) <= 1 + size / 2000


def test_bad_arguments_say_rule_and_value():
    with pytest.raises(ConfigError, match="convention must be one of relative_1000, absolute; got 'pixels'"):
        boxes_to_pixels([], convention="pixels", width=9, height=9)
    with pytest.raises(DataError, match="at least 1 px; got original 9x9, resized 0x9"):
        boxes_to_pixels([], convention="absolute", width=9, height=9, resized_width=0)
    with pytest.raises(DataError, match="four numbers"):
        boxes_to_pixels([[1, 2, 3]], convention="absolute", width=9, height=9)
    with pytest.raises(DataError, match="four finite numbers"):
        boxes_to_pixels([[1, 2, 3, math.nan]], convention="absolute", width=9, height=9)
    with pytest.raises(DataError, match="counted from 1; got 0"):
        Box(1, 2, 3, 4, image=0)
