# SPDX-License-Identifier: Apache-2.0
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.media import load_image
from embedrl_verl.data.pixels import to_rgb
from embedrl_verl.errors import MediaError

WHITE = (255, 255, 255)


def png(width, bits, colour, row, key=b""):
    """A PNG of one row."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    key = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(width, bits, row, kind=1, photometric=1, order="<"):
    """A TIFF of one row, one sample a pixel; kind 1: unsigned, 2: signed."""
    tags = {
        256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(row), 339: kind,
    }  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    table = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(tags)) + table + bytes(4) + row


def seen(content):
    """Pixels of the first row; a grey one as one number."""
    image = load_image(content, None)
    pixels = [image.getpixel((x, 0)) for x in range(image.width)]
    return [pixel[0] if len(set(pixel)) == 1 else pixel for pixel in pixels]


@pytest.mark.parametrize(
    ("bits", "row", "key", "shown"),
    [
        (1, b"\x80", 1, [255, 0]),
        (1, b"\x80", 0, [255, 255]),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x0f\x30", 0, [255, 255, 51, 255]),
        (4, b"\x0f\x30", 3, [0, 255, 255, 0]),
        (8, b"\x00\x80\xff", 128, [0, 255, 255]),
        (16, b"\x00\x00\x80\x00\x80\x01", 0, [255, 127, 127]),
        (16, b"\x00\x00\x80\x00\x80\x01", 0x8001, [0, 127, 255]),
    ],
)
def test_a_grey_png_of_any_depth_is_white_where_its_key_says(bits, row, key, shown):
    width = len(shown)
    assert seen(png(width, bits, 0, row, struct.pack(">H", key))) == shown
    opaque = seen(png(width, bits, 0, row))
    assert [a for a, b in zip(opaque, shown, strict=True) if b != 255] == [value for value in shown if value != 255]


def test_a_key_of_a_16_bit_rgb_png_is_refused_and_without_one_it_is_read():
    row = struct.pack(">6H", 0, 32768, 65535, 65535, 0, 257)
    assert seen(png(2, 16, 2, row)) == [(0, 128, 255), (255, 0, 1)]
    with pytest.raises(MediaError, match=r"media of \d+ bytes: a 16-bit RGB PNG with a transparent colour"):
        seen(png(2, 16, 2, row, row[:6]))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P"])
def test_an_alpha_channel_is_over_white_in_every_mode(mode):
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 0, 128)):
        picture.putpixel((x, 0), (60, 60, 60, alpha))
    options = {"transparency": b"\xff\x00\x80"} if mode == "P" else {}
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([60] * 9)
        image.putdata([0, 1, 2])
    else:
        image = picture.convert("LA" if mode == "PA" else mode)
    if mode == "PA":  # grey levels as the places of a grey palette
        image = Image.merge("PA", image.split())
        image.putpalette([level for grey in range(256) for level in (grey, grey, grey)])
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "PA" else "PNG", **options)
    assert seen(buffer.getvalue()) == [60, 255, pytest.approx(157, abs=1)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_grey_tiff_shows_all_levels(order):
    row = struct.pack(order + "4H", 0, 32896, 65535, 257)
    assert seen(tiff(4, 16, row, order=order)) == [0, 128, 255, 1]


def test_white_may_be_zero():
    assert seen(tiff(3, 16, struct.pack("<3H", 0, 32896, 65535), photometric=0)) == [255, 127, 0]
    assert seen(tiff(3, 8, b"\x00\x80\xff", photometric=0)) == [255, 127, 0]


def test_a_12_bit_tiff_is_not_black():
    assert seen(tiff(4, 12, b"\x00\x0f\xff\x80\x8f\xff")) == [0, 255, 128, 255]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "kind", "form"), [(8, 2, "b"), (16, 2, "h"), (32, 2, "i"), (32, 1, "I"), (32, 3, "f")]
)
def test_pixels_without_a_known_range_are_refused(bits, kind, form, order):
    with pytest.raises(MediaError, match="no known range; save with 8 or 16 bits|not a readable image"):
        seen(tiff(3, 8 * struct.calcsize("=" + form), struct.pack(f"{order}3{form}", 0, 1, 100), kind, order=order))


def test_a_pgm_of_any_depth_shows_all_levels():
    assert seen(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 32896, 65535)) == [0, 128, 255]
    assert seen(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 511, 1023)) == [0, 127, 255]
    assert seen(b"P5 3 1 15\n" + bytes([0, 8, 15])) == [0, 136, 255]


@pytest.mark.parametrize("values", [[-1, 0], [0, 65536], [0, 2**31 - 1]])
def test_integers_of_another_range_are_refused_in_memory_too(values):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    with pytest.raises(MediaError, match=r"grey pixels must be 0\.\.65535"):
        to_rgb(image)
    assert to_rgb(Image.fromarray(np.array([[0, 65535]], dtype=np.int32))).getpixel((1, 0)) == WHITE
