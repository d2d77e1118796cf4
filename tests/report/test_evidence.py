# SPDX-License-Identifier: Apache-2.0
"""What a T-CoT points at, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.media import LoadedItem, MediaLimits, fit_image
from embedrl_verl.data.video import list_times
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.families import BoxConvention, Family
from embedrl_verl.kinds import InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.views import TcotView
from tests.report.conftest import noise, tcot

LIMITS = MediaLimits(28, image_min_tokens=16, image_max_tokens=64)
PICTURE = noise(0, 400, 200)


def item(images: tuple[Image.Image, ...] = (PICTURE,), frames: int = 0, text: str = "") -> LoadedItem:
    clip = tuple(noise(90 + n, 56, 56) for n in range(frames))
    return LoadedItem(text, "", images, clip, list_times(2.0, frames) if frames else None)


ITEM = item()


def view(evidence: Any, loaded: LoadedItem, units: BoxConvention = "relative_1000") -> TcotView:
    kind: InputKind = "query_image" if loaded.images else "query_video" if loaded.frames else "query_text"
    return TcotReader(units, LIMITS).view(tcot(evidence), loaded, kind)


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_boxes_are_read_in_the_units_of_the_family() -> None:
    relative = view({"bbox_2d": [100, 200, 500, 800]}, item())
    assert relative.boxes[0].pixels == (40, 40, 200, 160) and relative.flags == ()
    assert fit_image(PICTURE, LIMITS).size == (308, 140)
    absolute = view({"bbox_2d": [77, 35, 154, 70]}, item(), "absolute")
    assert absolute.boxes[0].pixels == (100, 50, 200, 100) and absolute.flags == ()


@pytest.mark.parametrize(("units", "family"), [("relative_1000", "qwen2_vl"), ("absolute", "qwen2_5_vl")])
def test_pieces_are_those_that_the_embedder_gets(units: BoxConvention, family: Family) -> None:
    random = np.random.default_rng(1)
    loaded = item((PICTURE, noise(1, 90, 300)), frames=5)
    for _ in range(50):
        corners = random.integers(-50, 1050, (random.integers(1, 9), 4)).tolist()
        boxes = [{"image": int(random.integers(1, 4)), "box": box} for box in corners]
        text = tcot({"bbox_2d": boxes + boxes[:1], "key_frames": random.integers(1, 6, 3).tolist()})
        found = TcotReader(units, LIMITS).view(text, loaded, None, prefix="A")
        sizes = [fit_image(image, LIMITS).size for image in loaded.images]
        images = EmbedInput.with_tcot(loaded, text, family, EvidenceConfig(), sizes).evidence
        named = {box.name: box for box in found.boxes}
        for piece, image in zip(found.pieces, images, strict=True):
            assert same(piece.image, image) and piece.read_at == fit_image(image, LIMITS).size
            if piece.colour is None:
                assert same(image, loaded.frames[int(piece.name.removeprefix("frame A")) - 1])
            else:
                box = named[piece.name]
                assert box.pixels is not None and same(image, loaded.images[box.image - 1].crop(box.pixels))


def test_what_is_wrong_is_flagged() -> None:
    clip, words = item((), frames=4), item((), text="there is  a bus")

    def codes(evidence: Any, loaded: LoadedItem = ITEM, units: BoxConvention = "relative_1000") -> list[str]:
        return [flag.code for flag in view(evidence, loaded, units).flags]

    assert codes({"bbox_2d": [100, 100, 110, 900]}) == ["tiny_box"]
    assert codes({"bbox_2d": [500, 500, 400, 400]}) == ["lost_box"]
    assert codes({"bbox_2d": [0, 0, 1000, 990]}) == ["whole_image"]
    assert (
        codes({"bbox_2d": [200, 300, 1400, 900]})
        == codes({"bbox_2d": [20, 30, 250, 150]}, units="absolute")
        == ["units"]
    )
    assert codes({"bbox_2d": [{"image": 2, "box": [1, 1, 900, 900]}]}) == ["form", "no_evidence"]
    assert codes({"bbox_2d": [[50 * n, 0, 50 * n + 300, 400] for n in range(10)]}) == ["too_much"]
    assert codes({"text_keywords": ["bus"]}, item(text="a bus")) == ["no_evidence"]
    assert codes({"text_keywords": ["a BUS", "tram", "abus"]}, words) == ["keyword"]
    assert codes({"key_frames": [1, 9]}, clip) == ["form"]
    assert codes({"bbox_2d": [1, 2, 300, 400]}, words) == ["no_evidence", "lost_box"]


def test_without_media_only_the_form_is_judged() -> None:
    reader = TcotReader("relative_1000", LIMITS)
    assert reader.view(tcot({"bbox_2d": [1, 2, 300, 400]}), None, "query_image").flags == ()
    assert [flag.code for flag in reader.view("words", None, "query_image").flags] == ["form", "no_evidence"]
