# SPDX-License-Identifier: Apache-2.0
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig, MediaConfig
from embedrl_verl.data import media
from embedrl_verl.data.media import MediaLimits, fit_image, load_image, load_item, smart_resize
from embedrl_verl.data.schema import Item, Video
from embedrl_verl.errors import ConfigError, MediaError

# token side, min and max tokens, height and width in, height and width out (measured on the Qwen-VL processors)
VECTORS = [
    (28, 4, 16384, 428, 640, 420, 644),
    (28, 4, 1280, 1080, 1920, 728, 1316),
    (28, 4, 16384, 1080, 1920, 1092, 1932),
    (28, 4, 1280, 3000, 4000, 840, 1148),
    (28, 4, 1280, 20, 20, 56, 56),
    (28, 4, 1280, 100, 30, 112, 28),
    (28, 4, 1280, 42, 70, 56, 56),
    (28, 256, 1280, 224, 224, 448, 448),
    (32, 4, 16384, 428, 640, 416, 640),
    (32, 4, 16384, 1080, 1920, 1088, 1920),
    (32, 4, 16384, 48, 80, 64, 64),
    (32, 4, 1800, 1080, 1920, 992, 1792),
    (32, 128, 768, 1080, 1920, 640, 1152),
    (32, 128, 768, 480, 640, 480, 640),
    (32, 128, 768, 224, 224, 384, 384),
    (32, 128, 300, 360, 640, 352, 640),
    (32, 128, 300, 720, 1280, 384, 736),
    (32, 128, 300, 1000, 1000, 544, 544),
    (32, 128, 300, 240, 320, 320, 448),
]


@pytest.mark.parametrize(("side", "low", "high", "h", "w", "new_h", "new_w"), VECTORS)
def test_sizes_are_those_of_the_processors(side, low, high, h, w, new_h, new_w):
    assert smart_resize(h, w, token_side=side, min_tokens=low, max_tokens=high) == (new_h, new_w)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([28, 32]))
def test_a_fitted_size_stays_as_it_is_under_the_processors_wider_limits(h, w, side):
    if max(h, w) > 200 * min(h, w):
        with pytest.raises(MediaError, match="factor of 200"):
            smart_resize(h, w, token_side=side, min_tokens=128, max_tokens=768)
        return
    fitted = smart_resize(h, w, token_side=side, min_tokens=128, max_tokens=768)
    assert all(length % side == 0 for length in fitted)
    assert smart_resize(*fitted, token_side=side, min_tokens=4, max_tokens=1280) == fitted


def test_limits_come_from_the_data_section_and_from_the_embedders():
    config = OmegaConf.create({"media_root": "m", "embedrl": {"family": "qwen3_vl", "image_max_tokens": 500}})
    settings = MediaConfig.from_config(config)
    assert settings == MediaConfig(family="qwen3_vl", image_max_tokens=500)
    assert MediaLimits.of(settings, 32, settings.max_frames) == MediaLimits(32, 128, 500, 128, 300, 8)
    with pytest.raises(ConfigError, match=r"data\.embedrl has no key image_max_token; its keys are"):
        MediaConfig.from_config({"embedrl": {"image_max_token": 5}})
    embedder = EmbedderConfig(path="x", image_min_tokens=5, frame_max_tokens=30, frame_min_tokens=6)
    assert MediaLimits.of(embedder, 28, 3) == MediaLimits(28, 5, embedder.image_max_tokens, 6, 30, 3)


def test_fit_image_uses_frame_limits_for_frames():
    limits = MediaLimits(32, 128, 768, 128, 300)
    image = Image.new("RGB", (1920, 1080))
    assert fit_image(image, limits).size == (1152, 640)
    assert fit_image(image, limits, is_frame=True).size == (736, 384)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_side": 14}, "token_side must be 28"),
        ({"token_side": 28, "image_min_tokens": 900}, "image tokens must satisfy"),
        ({"token_side": 28, "frame_min_tokens": 0}, "frame tokens must satisfy"),
        ({"token_side": 28, "max_frames": 0}, "max_frames must be at least 1"),
    ],
)
def test_impossible_limits_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MediaLimits(**values)


def test_path_and_bytes_give_the_same_pixels(root):
    by_path = load_image("a.png", root)
    by_bytes = load_image((root / "a.png").read_bytes(), None)
    assert by_path.mode == "RGB" and by_path.size == (56, 56)
    assert by_path.tobytes() == by_bytes.tobytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.png", r"'gone.png': no such file in the media root"),
        ("sub", "'sub': no such file"),
        ("../outside.png", r"'../outside.png' leaves the media root"),
        ("sub/../../outside.png", "leaves the media root"),
        ("corrupt.png", r"'corrupt.png': not a readable image"),
        ("truncated.png", r"'truncated.png': not a readable image"),
        ("nul\0.png", "null character"),
        ("x" * 5000, "cannot be looked up|no such file"),
    ],
)
def test_unusable_path_is_an_error_that_names_it(root, path, message):
    with pytest.raises(MediaError, match=message):
        load_image(path, root)


def test_a_path_may_lead_inside_the_root_only(root):
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "leaves.png").symlink_to(root.parent / "outside.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert load_image("inside.png", root).size == (56, 56)
    for path, media_root, message in (
        (str(root / "a.png"), root, "is absolute"),
        ("leaves.png", root, "leaves the media root"),
        ("loop.png", root, r"loop\.png"),
        ("a.png", None, r"set data\.media_root"),
        ("a.png", root / "nosuch", r"the media root .*nosuch is no folder; check the path"),
    ):
        with pytest.raises(MediaError, match=message):
            load_image(path, media_root)


def test_decompression_bomb_is_refused_by_its_header():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(MediaError, match=f"over the limit of {media.MAX_PIXELS} pixels"):
        load_image(bomb, None)


def test_image_just_over_the_pixel_limit_is_refused(monkeypatch, root):
    monkeypatch.setattr(media, "MAX_PIXELS", 56 * 56)
    assert load_image("a.png", root).size == (56, 56)
    with pytest.raises(MediaError, match=r"b\.png': 84x56 is over the limit of 3136 pixels"):
        load_image("sub/b.png", root)


def encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def tiff_with_an_odd_tag():
    """Its rows of pixels begin at the place 8.0, on which Pillow stumbles over its own feet (TypeError)."""
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20)).save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    (table,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, table)
    for place in range(table + 2, table + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", content, place) == (273,):
            struct.pack_into("<HIf", content, place + 2, 11, 1, 8.0)
    return bytes(content)


def test_only_sound_files_of_plain_formats_are_opened():
    with pytest.raises(MediaError, match="not a readable image"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", None)
    with pytest.raises(MediaError, match=r"not a readable image \(TypeError"):
        load_image(tiff_with_an_odd_tag(), None)


def test_every_mode_becomes_rgb():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(encode(clear, "PNG"), None).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16))
    assert load_image(encode(deep, "PNG"), None).getpixel((0, 0)) == (100, 100, 100)
    assert load_image(encode(Image.new("1", (4, 4), 1), "PNG"), None).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(MediaError, match="floating point"):
        load_image(encode(Image.new("F", (4, 4)), "TIFF"), None)


def corners(image):
    """Colours of the quarters, row by row."""
    places = [(x, y) for y in (1 / 4, 3 / 4) for x in (1 / 4, 3 / 4)]
    pixels = [image.getpixel((int(x * image.width), int(y * image.height))) for x, y in places]
    return [tuple(round(value / 255) for value in pixel) for pixel in pixels]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_its_exif_orientation_says(kind, orientation, root):
    """Stored as a camera stores it, read as it was seen: 40 wide, 24 high, four colours."""
    seen = Image.new("RGB", (40, 24))
    for number, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))):
        left, top = 20 * (number % 2), 12 * (number // 2)
        seen.paste(colour, (left, top, left + 20, top + 12))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = seen.transpose(turn[orientation]) if orientation in turn else seen
    tags = Image.Exif()
    tags[274] = orientation
    data = encode(stored, kind, exif=tags, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    (root / "turned").write_bytes(data)
    for media_of in (data, "turned"):
        found = load_image(media_of, root)
        assert found.size == (40, 24) and found.getexif().get(274, 1) == 1
        assert corners(found) == corners(seen)


def test_a_damaged_orientation_is_an_error_or_none():
    for value in (0, 9, 255):
        tags = Image.Exif()
        tags[274] = value
        assert load_image(encode(Image.new("RGB", (8, 4), (1, 2, 3)), "PNG", exif=tags), None).size == (8, 4)
    damaged = encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    try:
        assert load_image(damaged, None).size == (8, 4)
    except MediaError as error:
        assert "not a readable image" in str(error)


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_a_colour_that_stands_for_transparency_is_white(mode, root):
    picture = Image.new("RGB", (40, 40))
    picture.paste((255, 0, 0), (10, 10, 30, 30))
    image = {"RGB": picture, "P": picture.quantize(4), "L": picture.convert("L")}[mode]
    key = {"RGB": (0, 0, 0), "P": image.getpixel((0, 0)), "L": 0}[mode]
    found = load_image(encode(image, "PNG", transparency=key), root)
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((20, 20)) == {"RGB": (255, 0, 0), "P": (255, 0, 0), "L": (76, 76, 76)}[mode]


def test_originals_keep_their_size_and_order(root):
    loaded = load_item(Item(text="t", images=("sub/b.png", "a.png"), instruction="i", kind="page"), root)
    assert [image.size for image in loaded.images] == [(84, 56), (56, 56)]
    assert (loaded.text, loaded.instruction, loaded.kind, loaded.frames, loaded.times) == ("t", "i", "page", (), None)


def test_frames_are_drawn_evenly_and_tell_their_rate(root):
    for index in range(9):
        Image.new("RGB", (28, 28), (index, 0, 0)).save(root / f"{index}.png")
    video = Video(frames=tuple(f"{index}.png" for index in range(9)), fps=3.0)
    loaded = load_item(Item(video=video), root, max_frames=3)
    assert [frame.getpixel((0, 0)) for frame in loaded.frames] == [(0, 0, 0), (4, 0, 0), (8, 0, 0)]
    assert loaded.times.fps == pytest.approx(1.0)
    assert load_item(Item(video=video), root).times.fps == pytest.approx(3.0 * 8 / 9)
