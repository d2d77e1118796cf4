# SPDX-License-Identifier: Apache-2.0
"""Groups of near-duplicate images: the same picture saved twice, at another quality or size.

1. Each distinct image leaves a record: SHA-256 of its bytes, perceptual hash, shape; and its small picture.
2. Hashes at most `max_bits` apart agree on one of `max_bits + 1` bands of their bits (pigeonhole): pairs are found by
   sorting each band. A pair counts if shape and small pictures agree too (`embedrl_verl.curate.perceptual`).
3. Pairs are joined by union-find; the member with the smallest SHA-256 represents its group.

The groups depend neither on the order of the images nor on how they lie in files. Memory: 200 bytes a distinct image
while groups are formed; the small pictures stay on the disk (9 KiB each). A blank image, a video file, and an image
that differs in shape by more than 2 per cent is nobody's near duplicate.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedrl_verl.curate.perceptual import SIDE, Words, bit_distance, hash_of, largest_difference, picture_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError

MAX_BITS = 12
MAX_DIFFERENCE = 9.0
"""Grey values. Copies at JPEG quality 10, half the size or other brightness stay below, one changed number does not."""
MAX_SHAPE = 0.03
"""log2 of the ratio of the two shapes (width / height): 2 per cent."""
PAIRS_AT_ONCE = 512
ROWS_AT_ONCE = 1 << 16

LOOK = np.dtype([("digest", "u1", 32), ("words", "<u8", 4), ("shape", "<f4")])
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Likeness:
    """How alike two images must be.

    Attributes:
        max_bits: of 256 in which the hashes may differ, 0..64.
        max_difference: of grey values (0..255) of the small pictures, at the place where they differ most.
    """

    max_bits: int = MAX_BITS
    max_difference: float = MAX_DIFFERENCE

    def __post_init__(self) -> None:
        if not 0 <= self.max_bits <= 64:
            raise ConfigError(f"max_bits must lie in 0..64 of 256; got {self.max_bits}")
        if not 0 <= self.max_difference <= 255:
            raise ConfigError(f"max_difference must lie in 0..255 grey values; got {self.max_difference}")


class LookWriter:
    """Writes the looks of images, each distinct one once, to `<path>.looks` and `<path>.pictures`.

    Attributes:
        blank: distinct images that are blank and were left out.
    """

    def __init__(self, path: Path) -> None:
        self.blank = 0
        self._seen: set[bytes] = set()
        self._looks = open(path.with_suffix(".looks"), "wb")  # noqa: SIM115
        self._pictures = open(path.with_suffix(".pictures"), "wb")  # noqa: SIM115

    def __enter__(self) -> LookWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._looks, self._pictures):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def has(self, digest: bytes) -> bool:
        """True if the image of this SHA-256 was added."""
        return digest[:16] in self._seen

    def add(self, digest: bytes, image: Image.Image) -> None:
        """Add an image by the SHA-256 of its bytes."""
        self._seen.add(digest[:16])
        picture = picture_of(image)
        words = hash_of(picture)
        if words is None:
            self.blank += 1
            return
        look = np.zeros((), LOOK)
        look["digest"], look["words"] = np.frombuffer(digest, np.uint8), words
        look["shape"] = np.log2(image.width / image.height)
        self._looks.write(look.tobytes())
        self._pictures.write(picture.tobytes())


class Looks:
    """The distinct images of several files of `LookWriter`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        parts = [np.fromfile(path.with_suffix(".looks"), LOOK) for path in paths]
        self._pictures = [
            _pictures(path.with_suffix(".pictures"), len(part)) for path, part in zip(paths, parts, strict=True)
        ]
        looks = np.concatenate([np.zeros(0, LOOK), *parts])
        file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        row = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(part)) for part in parts)])
        first = _first_of_each(looks["digest"])
        self.digests, self.words, self.shapes = looks["digest"][first], looks["words"][first], looks["shape"][first]
        self._file, self._row = file[first], row[first]

    def __len__(self) -> int:
        return len(self.digests)

    def pictures(self, indices: Index) -> npt.NDArray[np.uint8]:
        """Small pictures (n, SIDE, SIDE) of the images with these indices (n,)."""
        found = np.empty((len(indices), SIDE, SIDE), np.uint8)
        for place, index in enumerate(indices.tolist()):
            found[place] = self._pictures[self._file[index]][self._row[index]]
        return found


def near_groups(looks: Looks, likeness: Likeness) -> Index:
    """For each image the index of its group's first member (its own without near duplicates); shape (len(looks),)."""
    parents = np.arange(len(looks))
    for left, right in _close_hashes(looks.words, likeness.max_bits):
        apart = (_roots(parents, left) != _roots(parents, right)) & (
            np.abs(looks.shapes[left] - looks.shapes[right]) <= MAX_SHAPE
        )
        left, right = left[apart], right[apart]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            a, b = left[start : start + PAIRS_AT_ONCE], right[start : start + PAIRS_AT_ONCE]
            alike = largest_difference(looks.pictures(a), looks.pictures(b)) <= likeness.max_difference
            for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                _join(parents, one, other)
    return _roots(parents, np.arange(len(looks)))


class Representatives:
    """Which image stands for which.

    Args:
        digests: uint8 (n, 32), SHA-256 of every image that has near duplicates, in ascending order.
        firsts: uint8 (n, 32), SHA-256 of the image that stands for it.
    """

    def __init__(self, digests: npt.NDArray[np.uint8], firsts: npt.NDArray[np.uint8]) -> None:
        self._digests, self._firsts = digests, firsts
        self._keys = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel()

    @classmethod
    def of_groups(cls, looks: Looks, groups: Index) -> Representatives:
        """From the result of `near_groups`."""
        sizes = np.bincount(groups, minlength=len(looks))
        members = np.flatnonzero(sizes[groups] > 1)
        return cls(looks.digests[members], looks.digests[groups[members]])

    def __len__(self) -> int:
        return len(self._keys)

    def save(self, path: Path) -> None:
        """Write a file, complete or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, np.stack([self._digests, self._firsts]))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Representatives:
        """Read what `save` wrote."""
        digests, firsts = np.load(path)
        return cls(digests, firsts)

    def of(self, digest: bytes) -> bytes | None:
        """SHA-256 of the image that stands for this one; None if it has no near duplicate."""
        place = int(np.searchsorted(self._keys, int.from_bytes(digest[:8], "big")))
        if place < len(self._keys) and self._digests[place].tobytes() == digest:
            return bytes(self._firsts[place].tobytes())
        return None


def _close_hashes(words: Words, max_bits: int) -> Iterator[tuple[Index, Index]]:
    """Index pairs of hashes at most `max_bits` apart, in blocks; a pair may come more than once.

    Equal hashes are linked in a chain, and only one of them takes part in the search. Neighbouring coefficients go to
    different bands, so that no band is made of the strongest ones alone.
    """
    if len(words) < 2:
        return
    order = np.lexsort(words.T).astype(np.int64)
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    yield order[:-1][same], order[1:][same]
    single = order[np.concatenate([[True], ~same])]
    for band in range(max_bits + 1):
        key = _band(words[single], band, max_bits + 1)
        ranked = np.argsort(key, kind="stable")
        run = np.cumsum(np.concatenate([[False], key[ranked[1:]] != key[ranked[:-1]]]))
        place = np.arange(len(run))
        step = 0
        while len(place):
            step += 1
            place = place[place + step < len(run)]
            place = place[run[place] == run[place + step]]
            left, right = single[ranked[place]], single[ranked[place + step]]
            near = bit_distance(words[left], words[right]) <= max_bits
            yield left[near], right[near]


def _band(words: Words, band: int, bands: int) -> Words:
    """Every `bands`-th bit from `band` on, folded into one number: equal bits give equal numbers; (n, 4) → (n,)."""
    keys = np.empty(len(words), np.uint64)
    for start in range(0, len(words), ROWS_AT_ONCE):
        bits = np.unpackbits(words[start : start + ROWS_AT_ONCE].view(np.uint8), axis=1)[:, band::bands]
        packed = np.packbits(bits, axis=1)
        padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
        keys[start : start + ROWS_AT_ONCE] = np.bitwise_xor.reduce(padded.view(np.uint64), axis=1)
    return keys


def _first_of_each(digests: npt.NDArray[np.uint8]) -> Index:
    """Indices of the distinct rows, in ascending order of the rows; (n, 32) → (m,)."""
    keys = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    order = np.lexsort(keys.T[::-1])
    new = np.concatenate([[True], (keys[order[1:]] != keys[order[:-1]]).any(axis=1)])[: len(order)]
    first: Index = order[new].astype(np.int64)
    return first


def _roots(parents: Index, members: Index) -> Index:
    roots = parents[members]
    while (parents[roots] != roots).any():
        roots = parents[roots]
    return roots


def _join(parents: Index, one: int, other: int) -> None:
    """Union by the smaller index, with path halving."""
    ends = []
    for member in (one, other):
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = int(parents[member])
        ends.append(member)
    parents[max(ends)] = min(ends)


def _pictures(path: Path, count: int) -> npt.NDArray[np.uint8]:
    """The small pictures of a file, left on the disk; (count, SIDE, SIDE)."""
    if count == 0:
        return np.empty((0, SIDE, SIDE), np.uint8)
    return np.memmap(path, np.uint8, "r", shape=(count, SIDE, SIDE))
