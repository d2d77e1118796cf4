# SPDX-License-Identifier: Apache-2.0
"""Which targets are the same thing: the id behind the false-negative masks.

Two pairs of a batch whose targets have the same content must not be negatives of each other. The same `target_id` means
the same content; without one, the content is the normalised text together with a hash of every medium's bytes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

from embedrl_verl.data.media import resolve_media_path
from embedrl_verl.data.schema import Item, Media, PairRecord

CHUNK = 1 << 20


def content_id(record: PairRecord, media_root: str | Path | None) -> int:
    """Stable id of the target's content in the range of int64: the same on every machine and in every run.

    Ids and contents live in separate spaces: a record with a `target_id` never equals one without.

    Raises:
        MediaError: a medium that has to be hashed is missing or refused.
    """
    if record.target_id:
        return _to_int64(_digest([b"id", record.target_id.encode()]))
    return _to_int64(_digest([b"content", *_content_parts(record.target, media_root)]))


def normalise_text(text: str) -> str:
    """Text without differences that do not change its content: case, width, composed accents, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _content_parts(item: Item, media_root: str | Path | None) -> list[bytes]:
    parts = [normalise_text(item.text).encode()]
    parts += [b"image" + _media_digest(media, media_root) for media in item.images]
    if item.video is not None:
        frames: tuple[Media, ...] = item.video.frames if item.video.path is None else (item.video.path,)
        parts += [b"frame" + _media_digest(media, media_root) for media in frames]
    return parts


def _media_digest(media: Media, media_root: str | Path | None) -> bytes:
    """SHA-256 of the encoded bytes, whether they come as bytes or in a file."""
    if isinstance(media, bytes):
        return hashlib.sha256(media).digest()
    digest = hashlib.sha256()
    with open(resolve_media_path(media, media_root), "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.digest()


def _digest(parts: list[bytes]) -> bytes:
    """SHA-256 of a list of strings; each is hashed first, so that moving a border between two changes the result."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _to_int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)
