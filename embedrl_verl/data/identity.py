# SPDX-License-Identifier: Apache-2.0
"""Which queries and which targets are the same thing: the ids behind the false-negative masks.

Two pairs with an equal query or an equal target must not be negatives of each other (`shares_content`): the target of
the one is a right answer of the other. The same `query_id` or `target_id` means the same content; without one, the
content is the normalised text (of a query: instruction and text) together with a hash of every medium's bytes. That is
also what `embedrl data content-ids` writes where an id is empty, so that records with and without such ids mix.

Equality goes by id, never on from pair to pair: of q1-t1, q1-t2 and q2-t2 the first and the last are negatives of each
other.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedrl_verl.data.files import sha256_of
from embedrl_verl.data.media import resolve_media_path
from embedrl_verl.data.schema import Item, Media, PairRecord
from embedrl_verl.errors import DataError, MediaError

if TYPE_CHECKING:  # commands that only hash need not wait for torch
    from torch import Tensor

ANSWER_ID = "answer:"
"""How converters begin the `target_id` of a short answer, which is text."""
TEXT_ID = "content-text:"
MEDIA_ID = "content-media:"
STATED_CONTENT = re.compile(rf"(?:{TEXT_ID}|{MEDIA_ID})([0-9a-f]{{32}})")
NO_QUERY = -1
"""`ContentId.query` of what answers no query, a hard negative."""


class ContentId(NamedTuple):
    """What a pair is of: ids of its query's and of its target's content, in the range of int64."""

    query: int
    target: int


def shares_content(rows: Tensor, cols: Tensor) -> Tensor:
    """(R, C) bool: the two pairs have an equal query or an equal target, so neither is the other's negative.

    Args:
        rows, cols: int64 (R, K) and (C, K) ids of a pair's contents (K = 2: `ContentId`), or (R,) and (C,).
    """
    if rows.dim() == 1:
        return rows[:, None] == cols[None, :]
    found = rows[:, None, 0] == cols[None, :, 0]
    for left, right in zip(rows.T[1:], cols.T[1:], strict=True):
        found |= left[:, None] == right[None, :]
    return found


def false_negative_share(query: npt.NDArray[Any], target: npt.NDArray[Any]) -> float:
    """Probability that another one of these pairs, drawn at random, shares the query or the target.

    Args:
        query, target: ids (N,) of the pairs' contents, of any one dtype.
    """
    if len(query) < 2:
        return 0.0
    (_, q), (_, t) = (np.unique(ids, return_inverse=True) for ids in (query, target))
    repeats = [np.unique(ids, return_counts=True)[1] for ids in (q, t, q * len(t) + t)]
    of_query, of_target, of_both = (float((count * (count - 1.0)).sum()) for count in repeats)
    return (of_query + of_target - of_both) / (len(q) * (len(q) - 1.0))


def content_id(record: PairRecord, media_root: str | Path | None) -> ContentId:
    """Stable ids of the contents of a pair: the same on every machine and in every run.

    Ids of a source and contents live in separate spaces: a target with a source's `target_id` never equals one without,
    and so with `query_id`. An id made by `stated_content_id` stands for the content.
    """
    query, target = _stated(record.query_id), _stated(record.target_id)
    if query is None:
        item = record.item("query")
        query = target_content(item, media_root, normalise_text(item.instruction))
    return ContentId(query, target_content(record.target, media_root) if target is None else target)


def target_content(item: Item, media_root: str | Path | None, *before: str) -> int:
    """Id of a target's or hard negative's own content (text, after the texts `before`, and media), whatever ids its
    record states."""
    clip: tuple[Media, ...] = ()
    if item.video is not None:
        clip = item.video.frames if item.video.path is None else (item.video.path,)
    images, frames = ([media_digest(media, media_root) for media in several] for several in (item.images, clip))
    return _to_int64(_content_digest((*before, normalise_text(item.text)), images, frames))


def stated_content_id(texts: Sequence[str], images: Sequence[bytes] = (), frames: Sequence[bytes] = ()) -> str:
    """The `target_id` or `query_id` of a content: "content-text:<hex>", with images or a video "content-media:<hex>".

    Args:
        texts: of a target its text, of a query its instruction and its text, as `normalise_text` returns them.
        images: SHA-256 of each image's bytes, in order.
        frames: SHA-256 of each frame's bytes, or the one of the video file.
    """
    return (MEDIA_ID if images or frames else TEXT_ID) + _content_digest(texts, images, frames).hex()[:32]


def normalise_text(text: str) -> str:
    """Text without differences that do not change its content: case, width, composed accents, white space."""
    composed = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(composed.casefold().split())


def media_digest(media: Media, media_root: str | Path | None) -> bytes:
    """SHA-256 of the encoded bytes, whether they come as bytes or in a file."""
    if isinstance(media, bytes):
        return hashlib.sha256(media).digest()
    path = resolve_media_path(media, media_root)
    try:
        return bytes.fromhex(sha256_of(path))
    except DataError as error:
        raise MediaError(f"media path {media!r}: {error}") from error


def _stated(name: str) -> int | None:
    """The id that a `query_id` or `target_id` stands for; None if it is empty."""
    if not name:
        return None
    stated = STATED_CONTENT.fullmatch(name)
    return _to_int64(bytes.fromhex(stated[1]) if stated else _digest([b"id", name.encode()]))


def _content_digest(texts: Sequence[str], images: Sequence[bytes], frames: Sequence[bytes]) -> bytes:
    media = [b"image" + digest for digest in images] + [b"frame" + digest for digest in frames]
    return _digest([b"content", *(text.encode() for text in texts), *media])


def _digest(parts: list[bytes]) -> bytes:
    """SHA-256 of a list of strings; each is hashed first, so that moving a border between two changes the result."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _to_int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def record_digest(record: PairRecord, media_root: str | Path | None) -> bytes:
    """16 bytes that change with any field of a record; of a medium in a file, with its path and size."""

    def plain(media: Media) -> str:
        if isinstance(media, bytes):
            return hashlib.sha256(media).hexdigest()
        return f"{media}:{resolve_media_path(media, media_root).stat().st_size}"

    def item(one: Item) -> dict[str, object]:
        clip = one.video
        video = clip and [plain(part) for part in (clip.frames or (clip.path or "",))] + [clip.fps]
        media = {"images": [plain(image) for image in one.images], "video": video}
        return {"text": one.text, "instruction": one.instruction, "kind": one.kind, "tcot": one.tcot, **media}

    ids = [record.pair_id, record.data_source, record.instruction, record.query_id, record.target_id]
    sides = [item(one) for one in (record.query, record.target, *record.negatives)]
    return hashlib.sha256(json.dumps([ids, sides], ensure_ascii=False).encode()).digest()[:16]
