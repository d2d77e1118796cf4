# SPDX-License-Identifier: Apache-2.0
"""Groups of near-duplicate images: the same picture saved twice, at another quality or size.

1. Each distinct image leaves a perceptual hash (DCT, 256 bits), its shape, and a small grey picture (9 KiB of disk).
2. Hashes at most `max_bits` apart agree on one of `max_bits + 1` bands of their bits (pigeonhole): pairs are found by
   sorting each band. A pair counts if shapes and small pictures agree too.
3. Groups are the connected components; the member with the smallest SHA-256 represents its group.

A copy and a page with another number on it differ in as many bits: about ten. But a copy changes every pixel a little,
an edit few pixels a lot, so pairs that the hash finds are compared pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.ndimage import convolve1d
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedrl_verl.errors import ConfigError

SIDE, KEPT = 96, 16
MIN_DEVIATION = 4.0
"""Standard deviation of the grey values (0..255) under which an image counts as blank: its hash would be noise."""
MAX_SHAPE = 0.03
"""log2 of the ratio of the two shapes (width / height): 2 per cent."""
PAIRS_AT_ONCE = 512
LOOKS = pa.schema([("digest", pa.binary(32)), ("hash", pa.binary(32)), ("shape", pa.float32())])
Index = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Likeness:
    """How alike two images must be: bits of 256 in which the hashes may differ, and grey values (0..255) by which the
    small pictures may, at the place where they differ most."""

    max_bits: int = 12
    max_difference: float = 9.0

    def __post_init__(self) -> None:
        for name, most in (("max_bits", 64), ("max_difference", 255)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie in 0..{most}; got {getattr(self, name)}")


def write_looks(path: Path, images: Iterable[tuple[bytes, Image.Image]]) -> None:
    """Write how images look, by the SHA-256 of their bytes: a parquet file of `LOOKS`, beside it the small pictures.
    Blank images are nobody's near duplicates and left out."""
    looks = []
    with open(path.with_suffix(".pictures"), "wb") as pictures:
        for digest, image in images:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
            if np.asarray(small, np.float32).std() >= MIN_DEVIATION:
                bits = np.packbits(imagehash.phash(small, KEPT, SIDE // KEPT).hash).tobytes()
                looks.append({"digest": digest, "hash": bits, "shape": float(np.log2(image.width / image.height))})
                pictures.write(small.tobytes())
    pq.write_table(pa.Table.from_pylist(looks, LOOKS), path)


def representatives(paths: Sequence[Path], likeness: Likeness) -> dict[bytes, bytes]:
    """SHA-256 of every image that has near duplicates -> SHA-256 of the one that stands for it.

    Depends neither on the order of the images nor on how they lie in the files of `write_looks`.
    """
    looks = pa.concat_tables([LOOKS.empty_table(), *map(pq.read_table, paths)])
    digests, first = np.unique(np.array(looks["digest"].to_pylist(), "V32"), return_index=True)  # ascending
    hashes = np.array(looks["hash"].to_pylist(), "V32")[first].view(np.uint8).reshape(-1, 32)
    shapes, groups = looks["shape"].to_numpy()[first], np.arange(len(first))
    small: list[Bytes] = []
    for file in (path.with_suffix(".pictures") for path in paths):
        if file.stat().st_size:  # an empty file cannot be mapped
            small += [*np.asarray(np.memmap(file, np.uint8, "r")).reshape(-1, SIDE, SIDE)]
    for left, right in close_hashes(hashes, likeness.max_bits):
        apart = (groups[left] != groups[right]) & (np.abs(shapes[left] - shapes[right]) <= MAX_SHAPE)
        pairs = np.stack([left, right])[:, apart]
        for start in range(0, pairs.shape[1], PAIRS_AT_ONCE):
            one, other = pairs[:, start : start + PAIRS_AT_ONCE]
            pictures = (np.stack([small[number] for number in first[some]]) for some in (one, other))
            alike = largest_difference(*pictures) <= likeness.max_difference
            if alike.any():
                ends = groups[one[alike]], groups[other[alike]]
                links = coo_array((np.ones(len(ends[0])), ends), (len(groups), len(groups)))
                groups = connected_components(links, directed=False)[1][groups]
    _, leader, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    members = np.flatnonzero(sizes[group] > 1)
    return dict(zip(digests[members].tolist(), digests[leader[group[members]]].tolist(), strict=True))


def close_hashes(hashes: Bytes, max_bits: int) -> Iterator[tuple[Index, Index]]:
    """Index pairs of hashes (n, 32) at most `max_bits` apart, in blocks; a pair may come more than once.

    Neighbouring coefficients go to different bands, so that no band is made of the strongest ones alone.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)
    for band in range(max_bits + 1):
        key = np.zeros(len(words), np.uint64)
        for bit in range(band, 256, max_bits + 1):  # equal bits make equal keys; a clash costs a comparison
            key = key * np.uint64(6364136223846793005) + (hashes[:, bit // 8] >> (7 - bit % 8) & 1) + np.uint64(1)
        ranked, key = np.argsort(key, kind="stable"), np.sort(key)
        place, step = np.arange(len(key)), 0
        while len(place):
            step += 1
            place = place[place + step < len(key)]
            place = place[key[place] == key[place + step]]
            left, right = ranked[place], ranked[place + step]
            near = np.bitwise_count(words[left] ^ words[right]).sum(axis=1) <= max_bits
            yield left[near], right[near]


def largest_difference(a: Bytes, b: Bytes) -> Floats:
    """The largest difference of grey values at any place, after light smoothing and with brightness and contrast of the
    second picture fitted to the first; (n, SIDE, SIDE) and (n, SIDE, SIDE) -> (n,)."""
    (first, spread), (second, other_spread) = map(_centred, (a, b))
    largest: Floats = np.abs(first - second * (spread / other_spread)).max(axis=(1, 2))
    return largest


def _centred(pictures: Bytes) -> tuple[Floats, Floats]:
    """Pictures after smoothing (weights 1, 2, 1 in both directions) around a mean of 0, and their deviations."""
    smooth = pictures.astype(np.float32)
    for axis in (1, 2):
        smooth = convolve1d(smooth, [0.25, 0.5, 0.25], axis, mode="nearest")
    smooth -= smooth.mean(axis=(1, 2), keepdims=True)
    return smooth, smooth.std(axis=(1, 2), keepdims=True)
