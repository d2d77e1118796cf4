# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.media import LoadedItem, MediaLimits, fit_image
from embedrl_verl.data.video import list_times
from embedrl_verl.families import BoxConvention
from embedrl_verl.kinds import InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.views import TcotView
from embedrl_verl.tcot import cut_evidence, parse_tcot
from tests.report.inputs import noise, tcot

LIMITS = MediaLimits(28, image_min_tokens=16, image_max_tokens=64)


def item(images: tuple[Image.Image, ...] = (), frames: int = 0, text: str = "") -> LoadedItem:
    clip = tuple(noise(90 + n, 56, 56) for n in range(frames))
    return LoadedItem(text, "", images, clip, list_times(2.0, frames) if frames else None)


def view(
    evidence: Any, loaded: LoadedItem, kind: InputKind = "query_image", convention: BoxConvention = "relative_1000"
) -> TcotView:
    return TcotReader(convention, LIMITS).view(tcot(evidence), loaded, kind)


def codes(found: TcotView) -> list[str]:
    return [flag.code for flag in found.flags]


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_boxes_are_read_in_the_units_of_the_family() -> None:
    picture = noise(0, 400, 200)
    relative = view({"bbox_2d": [100, 200, 500, 800]}, item((picture,)))
    assert relative.boxes[0].pixels == (40, 40, 200, 160) and relative.flags == ()
    seen = fit_image(picture, LIMITS).size
    assert seen == (308, 140)
    absolute = view({"bbox_2d": [77, 35, 154, 70]}, item((picture,)), convention="absolute")
    assert absolute.boxes[0].pixels == (100, 50, 200, 100) and absolute.flags == ()
    assert same(relative.pieces[0].image, picture.crop((40, 40, 200, 160)))
    assert same(absolute.pieces[0].image, picture.crop((100, 50, 200, 100)))


@pytest.mark.parametrize("convention", ["relative_1000", "absolute"])
def test_pieces_are_those_that_the_embedder_gets_with_the_names_of_their_boxes(convention: BoxConvention) -> None:
    random = np.random.default_rng(1)
    loaded = item((noise(0, 400, 200), noise(1, 90, 300)), frames=5)
    for _ in range(50):
        boxes = [
            {"image": int(random.integers(1, 4)), "box": random.integers(-50, 1050, 4).tolist()}
            for _ in range(random.integers(1, 9))
        ]
        boxes += boxes[:1]
        evidence = {"bbox_2d": boxes, "key_frames": random.integers(1, 6, 3).tolist()}
        text = tcot(evidence)
        found = TcotReader(convention, LIMITS).view(text, loaded, "query_image")
        sizes = [fit_image(image, LIMITS).size for image in loaded.images]
        cut = cut_evidence(
            parse_tcot(text, num_frames=5, num_images=2),
            images=loaded.images,
            frames=loaded.frames,
            family="qwen2_vl" if convention == "relative_1000" else "qwen2_5_vl",
            resized_sizes=sizes,
        )
        assert len(found.pieces) == len(cut.images)
        named = {box.name: box for box in found.boxes}
        for piece, image in zip(found.pieces, cut.images, strict=True):
            assert same(piece.image, image) and piece.read_at == fit_image(image, LIMITS).size
            if piece.colour is None:
                assert same(image, loaded.frames[int(piece.name.removeprefix("frame ")) - 1])
            else:
                box = named[piece.name]
                assert box.pixels is not None and same(image, loaded.images[box.image - 1].crop(box.pixels))


def test_what_is_wrong_with_boxes_is_flagged() -> None:
    loaded = item((noise(0, 400, 200),))
    assert codes(view({"bbox_2d": [100, 100, 110, 900]}, loaded)) == ["tiny_box"]
    assert codes(view({"bbox_2d": [500, 500, 400, 400]}, loaded)) == ["lost_box"]
    assert codes(view({"bbox_2d": [0, 0, 1000, 990]}, loaded)) == ["whole_image"]
    assert "units" in codes(view({"bbox_2d": [200, 300, 1400, 900]}, loaded))
    assert "units" in codes(view({"bbox_2d": [200, 30, 400, 90]}, loaded, convention="absolute"))
    assert codes(view({"bbox_2d": [{"image": 2, "box": [1, 1, 900, 900]}]}, loaded)) == ["form", "no_evidence"]
    found = view({"bbox_2d": [[100, 100, 110, 900], [100, 100, 500, 500]]}, loaded)
    assert "at least 10 px" in found.boxes[0].status and found.boxes[1].status == ""
    assert [piece.name for piece in found.pieces] == ["2"]


def test_evidence_of_the_wrong_kind_or_too_much_of_it_is_flagged() -> None:
    assert codes(view({"text_keywords": ["bus"]}, item((noise(0, 400, 200),), text="a bus"))) == ["no_evidence"]
    assert codes(view({"key_frames": [1, 9]}, item(frames=4), "query_video")) == ["form"]
    many = [[50 * n, 0, 50 * n + 300, 400] for n in range(10)]
    found = view({"bbox_2d": many}, item((noise(0, 400, 200),)))
    assert codes(found) == ["too_much"] and len(found.pieces) == 8
    assert codes(view({"text_keywords": ["a BUS", "tram"]}, item(text="there is  a bus"), "query_text")) == ["keyword"]


def test_labels_of_boxes_are_kept() -> None:
    evidence = {"bbox_2d": [{"label": "bus", "bbox_2d": [1, 2, 300, 400]}, [5, 6, 700, 800]]}
    assert [box.label for box in view(evidence, item((noise(0, 400, 200),))).boxes] == ["bus", ""]


def test_without_media_only_the_form_is_judged() -> None:
    reader = TcotReader("relative_1000", LIMITS)
    assert reader.view(tcot({"bbox_2d": [1, 2, 300, 400]}), None, "query_image").flags == ()
    assert [flag.code for flag in reader.view("words", None, "query_image").flags] == ["form", "no_evidence"]


def test_names_carry_the_prefix_of_their_tcot() -> None:
    reader = TcotReader("relative_1000", LIMITS)
    loaded = item((noise(0, 400, 200),), frames=3)
    found = reader.view(tcot({"bbox_2d": [1, 2, 300, 400], "key_frames": [2]}), loaded, None, prefix="A")
    assert [box.name for box in found.boxes] == ["A1"] and [piece.name for piece in found.pieces] == ["A1", "frame A2"]
