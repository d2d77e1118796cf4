# SPDX-License-Identifier: Apache-2.0
"""What a T-CoT points at, and what is wrong with it."""

import numpy as np
import pytest

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.media import LoadedItem, MediaLimits, fit_image
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.views import Flag
from tests.report.conftest import noise, tcot

LIMITS = MediaLimits(28, image_min_tokens=16, image_max_tokens=64)
PICTURE = noise(0, 400, 200)
FRAMES = tuple(noise(90 + number, 56, 56) for number in range(5))
IMAGE, WORDS = LoadedItem("a bus", "", (PICTURE,), ()), LoadedItem("there is  a bus", "", (), ())


def view(evidence, units="relative_1000", item=IMAGE):
    return TcotReader(units, LIMITS).view(tcot(evidence), item, "query_image" if item.images else "query_text")


def test_boxes_are_read_in_the_units_of_the_family():
    relative, absolute = view({"bbox_2d": [100, 200, 500, 800]}), view({"bbox_2d": [77, 35, 154, 70]}, "absolute")
    assert fit_image(PICTURE, LIMITS).size == (308, 140)
    assert (relative.boxes[0].pixels, absolute.boxes[0].pixels) == ((40, 40, 200, 160), (100, 50, 200, 100))
    assert relative.flags == absolute.flags == ()


@pytest.mark.parametrize(("units", "family"), [("relative_1000", "qwen2_vl"), ("absolute", "qwen2_5_vl")])
def test_pieces_are_those_that_the_embedder_gets(units, family):
    random = np.random.default_rng(1)
    item = LoadedItem("", "", (PICTURE, noise(1, 90, 300)), FRAMES)
    for _ in range(50):
        corners = random.integers(-50, 1050, (random.integers(1, 9), 4)).tolist()
        boxes = [{"image": int(random.integers(1, 4)), "box": box} for box in corners]
        text = tcot({"bbox_2d": boxes + boxes[:1], "key_frames": random.integers(1, 6, 3).tolist()})
        found = TcotReader(units, LIMITS).view(text, item, None, prefix="A")
        sizes = [fit_image(image, LIMITS).size for image in item.images]
        images = EmbedInput.with_tcot(item, text, family, EvidenceConfig(), sizes).evidence
        places = {f"frame A{number}": frame for number, frame in enumerate(FRAMES, 1)}
        places |= {box.name: item.images[box.image - 1].crop(box.pixels) for box in found.boxes if box.pixels}
        for piece, image in zip(found.pieces, images, strict=True):
            assert piece.image == image == places[piece.name] and piece.read_at == fit_image(image, LIMITS).size


def test_what_is_wrong_is_flagged():
    def codes(*given, item=IMAGE):
        return [flag.code for flag in view(*given, item=item).flags]

    assert codes({"bbox_2d": [100, 100, 110, 900]}) == ["tiny_box"]
    lost = view({"bbox_2d": [500, 500, 400, 400]})
    assert lost.flags == (Flag("lost_box", f"Box 1: {lost.boxes[0].status}."),) and lost.boxes[0].status
    assert codes({"bbox_2d": [-9, 300, 400, 900]}) == ["units"]
    assert codes({"bbox_2d": [0, 0, 1000, 990]}) == ["whole_image"]
    assert codes({"bbox_2d": [200, 300, 1400, 900]}) == codes({"bbox_2d": [9, 9, 250, 150]}, "absolute") == ["units"]
    assert codes({"bbox_2d": [{"image": 2, "box": [1, 1, 900, 900]}]}) == ["form", "no_evidence"]
    assert codes({"bbox_2d": [[50 * n, 0, 50 * n + 300, 400] for n in range(10)]}) == ["too_much"]
    assert codes({"text_keywords": ["bus"]}) == ["no_evidence"]
    assert codes({"text_keywords": ["a BUS", "abus"]}, item=WORDS) == ["keyword"]
    assert codes({"bbox_2d": [1, 2, 300, 400]}, item=WORDS) == ["no_evidence", "lost_box"]
    alone = TcotReader("relative_1000", LIMITS).view(tcot({"bbox_2d": [1, 2, 9, 9]}), None, "query_image")
    assert alone.flags == ()  # without media only the form is judged
