# SPDX-License-Identifier: Apache-2.0
"""Evidence is cut from the right place of the right original, once, and what is left out is told."""

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.media import LoadedItem, MediaLimits
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, INPUT_KINDS, InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.tcot import Box, TCoT, build_prompt, cut_evidence, format_reward, parse_tcot, prompts
from embedrl_verl.tcot.evidence import KINDS
from embedrl_verl.tcot.evidence.kind import EvidenceKind, items_of


def original(value, width=200, height=100):
    """An image that tells itself (red) and every place in it (green = x, blue = y)."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([np.full_like(x, value), x % 256, y % 256], axis=-1).astype(np.uint8))


IMAGES = [original(1), original(2, 400, 300)]
FRAMES = [original(100 + frame) for frame in range(1, 9)]


def pointing(*boxes, key_frames=()):
    return TCoT("", evidence={"bbox_2d": boxes, "key_frames": key_frames})


def cut(tcot, family="qwen3_vl", **options):
    return cut_evidence(tcot, **{"images": IMAGES, "frames": FRAMES, "family": family, **options})


def corner(image):
    """(which original, x, y) of a piece's upper left pixel."""
    return image.getpixel((0, 0))


def test_crops_come_from_the_image_that_the_box_names():
    """Not only from the first image (method section 6, error 8), and at that image's own size."""
    evidence = cut(pointing(Box(100, 200, 500, 600, image=2), Box(100, 200, 500, 600)))
    assert [corner(piece) for piece in evidence.images] == [(2, 40, 60), (1, 20, 20)]
    assert [piece.size for piece in evidence.images] == [(160, 120), (80, 40)]
    assert evidence.problems == ()


def test_key_frames_are_counted_from_one():
    """Frame 1 is the first and frame 8 the last of eight (method section 6, error 8)."""
    evidence = cut(pointing(key_frames=(8, 1)))
    assert [corner(piece)[0] for piece in evidence.images] == [108, 101] and evidence.problems == ()


def test_a_single_flat_box_is_cut():
    """It used to crash (method section 6, error 8)."""
    flat = parse_tcot('<thinking>{"bbox_2d": [0, 0, 500, 500]}</thinking><rethink>y</rethink><answer>z</answer>')
    nested = parse_tcot('<thinking>{"bbox_2d": [[0, 0, 500, 500]]}</thinking><rethink>y</rethink><answer>z</answer>')
    assert [piece.size for piece in cut(flat).images] == [piece.size for piece in cut(nested).images] == [(100, 50)]


def test_pixels_are_those_of_the_original():
    piece = cut(pointing(Box(100, 200, 500, 600))).images[0]
    assert np.array_equal(np.asarray(piece), np.asarray(IMAGES[0])[20:60, 20:100])


def test_absolute_boxes_are_scaled_from_the_size_that_the_reasoner_saw():
    boxes = pointing(Box(10, 10, 60, 40), Box(10, 10, 60, 40, image=2))
    seen = cut(boxes, "qwen2_5_vl", resized_sizes=[(100, 50), (200, 600)])
    assert [(*corner(piece), *piece.size) for piece in seen.images] == [(1, 20, 20, 100, 60), (2, 20, 5, 100, 15)]
    untouched = cut(boxes, "qwen2_5_vl")
    assert [(*corner(piece), *piece.size) for piece in untouched.images] == [(1, 10, 10, 50, 30), (2, 10, 10, 50, 30)]


def test_relative_boxes_do_not_depend_on_the_size_that_the_reasoner_saw():
    boxes = pointing(Box(100, 200, 500, 600))
    assert cut(boxes, "qwen2_vl", resized_sizes=[(28, 28), (28, 28)]).images == cut(boxes, "qwen2_vl").images


def test_the_same_place_or_frame_is_cut_once_and_order_is_kept():
    tcot = pointing(Box(0, 0, 500, 500), Box(0, 0, 500.4, 500), Box(0, 0, 500, 500, 2), key_frames=(3, 2, 3))
    evidence = cut(tcot)
    assert [corner(piece)[0] for piece in evidence.images] == [1, 2, 103, 102] and evidence.problems == ()


@pytest.mark.parametrize(
    ("tcot", "problem"),
    [
        (pointing(Box(0, 0, 49, 500)), "sides must be at least 10 px; got (0, 0, 9, 50)"),
        (pointing(Box(0, 0, 500, 99)), "sides must be at least 10 px; got (0, 0, 100, 9)"),
        (pointing(Box(500, 0, 100, 500)), "must have an area inside its image"),
        (pointing(Box(2000, 0, 3000, 500)), "must have an area inside its image"),
        (pointing(Box(0, 0, 500, 500, image=3)), "not be above the number of images, 2; got 3"),
        (pointing(key_frames=(9,)), "from 1 to the number of frames, 8; got 9"),
        (pointing(key_frames=(0,)), "from 1 to the number of frames, 8; got 0"),
    ],
)
def test_what_cannot_be_cut_is_left_out_and_told(tcot, problem):
    evidence = cut(tcot)
    assert evidence.images == () and len(evidence.problems) == 1 and problem in evidence.problems[0]


def test_limits_of_side_and_aspect_are_inclusive():
    wide = [original(1, 1000, 100)]
    for height, kept in ((20, 1), (19, 0)):  # 1000 x 20 has the aspect ratio 50
        assert len(cut(pointing(Box(0, 0, 1000, height * 10)), images=wide).images) == kept
    assert cut(pointing(Box(0, 0, 10, 100)), images=wide).images[0].size == (10, 10)


def test_the_cap_keeps_the_first_pieces_and_is_told():
    boxes = tuple(Box(0, 0, 100 + 50 * i, 500) for i in range(3))
    evidence = cut(pointing(*boxes, key_frames=(1, 2, 3)), max_evidence=4)
    assert [piece.width for piece in evidence.images] == [20, 30, 40, 200]
    assert evidence.problems == ("at most 4 pieces of evidence are kept, the first ones; got 6",)


def test_no_media_or_no_pointers_give_no_evidence():
    evidence = cut(pointing(Box(0, 0, 500, 500), key_frames=(1,)), images=[], frames=[])
    assert evidence.images == () and len(evidence.problems) == 2
    assert cut(parse_tcot("nothing readable")).images == ()


def test_bad_arguments_say_rule_and_value():
    with pytest.raises(DataError, match="one size for each image; got 1 for 2 images"):
        cut(TCoT(""), "qwen2_5_vl", resized_sizes=[(9, 9)])
    with pytest.raises(ConfigError, match="got 'llava'"):
        cut(TCoT(""), "llava")


def test_every_kind_of_input_calls_for_the_evidence_of_its_main_medium():
    assert set(EVIDENCE_KEY_OF_KIND) == set(INPUT_KINDS) == set(get_args(InputKind))
    for kind, key in EVIDENCE_KEY_OF_KIND.items():
        medium = {"text": "text", "image": "an image", "page": "an image", "video": "frames"}[kind.rpartition("_")[2]]
        assert KINDS[key].key == key and KINDS[key].medium == ("text" if kind == "query_text_to_video" else medium)


def test_a_new_kind_of_evidence_is_a_record_and_its_place_in_the_registry(monkeypatch):
    """Strips of an image, numbered from 1: asked for, read, required and cut like the others."""
    strips = EvidenceKind(
        key="strips",
        medium="an image",
        ask={"paper": "Name strips of the {{ num_images }} images.", "compact": "strips"},
        read=lambda found, size, problems: (one for one in items_of(found, "strips", problems) if one in (1, 2)),
        cut=lambda numbers, originals, problems: [
            lambda n=n: originals.images[0].crop((0, 50 * n - 50, 200, 50 * n)) for n in numbers
        ],
    )
    monkeypatch.setitem(KINDS, strips.key, strips)
    tcot = parse_tcot('<thinking>{"strips": [2, 1, 7]}</thinking><rethink>y</rethink><answer>z</answer>')
    assert tcot.evidence["strips"] == (2, 1) and format_reward(tcot, "strips") == 1.0
    assert [(*corner(piece), *piece.size) for piece in cut(tcot).images] == [(1, 0, 50, 200, 50), (1, 0, 0, 200, 50)]
    assert "must not be empty" in parse_tcot('{"strips": []}').problems[-1]
    monkeypatch.setattr(prompts, "EVIDENCE_KEY_OF_KIND", {**EVIDENCE_KEY_OF_KIND, "query_page": "strips"})
    (message,) = build_prompt("query_page", LoadedItem("", "", tuple(IMAGES), ()), family="qwen3_vl")
    assert "Name strips of the 2 images." in message["content"][-1]["text"]
    reader = TcotReader("relative_1000", MediaLimits(token_side=32))
    view = reader.view(tcot.text, LoadedItem("", "", tuple(IMAGES), ()), None)
    assert [(piece.name, piece.image.size) for piece in view.pieces] == [("piece 1", (200, 50)), ("piece 2", (200, 50))]
