# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.report.pictures import Budget, PictureBook, encode, scaled_to, shown_at
from tests.report.inputs import noise


def decoded(uri: str) -> Image.Image:
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_a_small_drawing_is_kept_exactly() -> None:
    drawing = Image.new("RGB", (90, 40), "white")
    drawing.paste((0, 0, 0), (10, 10, 30, 30))
    uri = encode(drawing, 640)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(np.asarray(decoded(uri)), np.asarray(drawing))


def test_a_large_picture_is_scaled_down_and_never_enlarged() -> None:
    uri = encode(noise(0, 900, 450), 300)
    assert uri.startswith("data:image/jpeg;base64,") and decoded(uri).size == (300, 150)
    assert decoded(encode(noise(0, 30, 20), 300)).size == (30, 20)


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (20, 4000), (333, 1)])
def test_no_side_vanishes(size: tuple[int, int]) -> None:
    assert min(scaled_to(size, 64)) >= 1 and max(scaled_to(size, 64)) <= 64
    assert min(shown_at(size, 100, 80)) >= 1 and shown_at(size, 100, 80)[0] <= 100 and shown_at(size, 100, 80)[1] <= 80


def test_what_the_budget_does_not_allow_is_refused_and_counted() -> None:
    length = len(encode(noise(0, 50, 50), 640))
    book = PictureBook(Budget(length))
    assert book.data_uri(noise(0, 50, 50)) is not None and book.data_uri(noise(1, 50, 50)) is None
    assert (book.budget.left, book.budget.refused) == (0, 1)
