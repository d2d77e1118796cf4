# SPDX-License-Identifier: Apache-2.0
"""How an image looks: a 256-bit perceptual hash to find look-alikes by, and a small picture to tell them apart with.

The hash is the DCT hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010),
section 3.2.1, with 16 x 16 coefficients in place of 8 x 8: the grey image is reduced, transformed by a two-dimensional
DCT-II, and each of the lowest coefficients gives one bit: is it above their median?

A hash alone cannot tell a page from the same page with another number on it: both a JPEG copy and such an edit change
about ten bits. A copy changes every pixel a little, an edit changes few pixels a lot; so a pair that the hash finds is
compared on the pictures, pixel by pixel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 96
KEPT = 16
MIN_DEVIATION = 4.0
"""Standard deviation of the grey values (0..255) under which an image counts as blank: its hash would be noise."""

Picture = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_DCT = np.cos(np.outer(np.arange(KEPT), (np.arange(SIDE) + 0.5) * np.pi / SIDE)).astype(np.float32)


def picture_of(image: Image.Image) -> Picture:
    """The image in grey, reduced to SIDE x SIDE; uint8."""
    reduced = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(reduced, dtype=np.uint8)


def hash_of(picture: Picture) -> Words | None:
    """256 bits as uint64 (4,); None if the picture is blank."""
    grey = picture.astype(np.float32)
    if grey.std() < MIN_DEVIATION:
        return None
    coefficients = (_DCT @ grey @ _DCT.T).ravel()
    bits = coefficients > np.median(coefficients[1:])
    bits[0] = False  # the mean brightness says nothing of the content
    return np.packbits(bits).view(np.uint64)


def bit_distance(a: Words, b: Words) -> npt.NDArray[np.int64]:
    """Bits in which hashes differ; (..., 4) and (..., 4) → (...)."""
    distances: npt.NDArray[np.int64] = np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)
    return distances


def largest_difference(a: Picture, b: Picture) -> npt.NDArray[np.float32]:
    """The largest difference of grey values at any place, after light smoothing and with brightness and contrast of the
    second picture fitted to the first; (n, SIDE, SIDE) and (n, SIDE, SIDE) → (n,)."""
    first, second = _smooth(a), _smooth(b)
    mean, deviation = first.mean(axis=(1, 2), keepdims=True), first.std(axis=(1, 2), keepdims=True)
    scale = deviation / np.maximum(second.std(axis=(1, 2), keepdims=True), 1e-6)
    fitted = (second - second.mean(axis=(1, 2), keepdims=True)) * scale + mean
    largest: npt.NDArray[np.float32] = np.abs(first - fitted).max(axis=(1, 2))
    return largest


def _smooth(pictures: Picture) -> npt.NDArray[np.float32]:
    """Weights 1, 2, 1 in both directions."""
    padded = np.pad(pictures.astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    smooth: npt.NDArray[np.float32] = (across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) * np.float32(1 / 16)
    return smooth
