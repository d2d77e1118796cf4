# SPDX-License-Identifier: Apache-2.0
"""Small images and records that the data tests share."""

import io

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.data.schema import Item, PairRecord


@pytest.fixture
def png():
    """`png(seed, width=56, height=56)`: bytes of an image of random pixels."""

    def draw(seed=0, width=56, height=56):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return draw


@pytest.fixture
def pair():
    """`pair("p1", source="s", query=Item(...), target=Item(...))`: a record, with text sides by default."""

    def make(pair_id, source="s", query=None, target=None, target_id="", negatives=()):
        return PairRecord(
            pair_id=pair_id,
            data_source=source,
            instruction="Find the answer.",
            query=query or Item(text=f"question {pair_id}"),
            target=target or Item(text=f"answer {pair_id}"),
            target_id=target_id,
            negatives=negatives,
        )

    return make


@pytest.fixture
def root(tmp_path, png):
    """A media root with `a.png` (56x56), `sub/b.png` (84x56), a broken and a truncated image."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(1))
    (folder / "sub" / "b.png").write_bytes(png(2, width=84))
    (folder / "corrupt.png").write_bytes(b"this is not an image")
    (folder / "truncated.png").write_bytes(png(3)[:200])
    (tmp_path / "outside.png").write_bytes(png(4))
    return folder
