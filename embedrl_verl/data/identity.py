# SPDX-License-Identifier: Apache-2.0
"""Which targets are the same thing: the id behind the false-negative masks.

Two pairs of a batch whose targets have the same content must not be negatives of each other. The same `target_id` means
the same content; without one, the content is the normalised text together with a hash of every medium's bytes. That is
also what `embedrl data content-ids` writes into an empty `target_id`, so that records with and without such an id mix.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from embedrl_verl.data.media import resolve_media_path
from embedrl_verl.data.schema import Item, Media, PairRecord
from embedrl_verl.errors import MediaError

CHUNK = 1 << 20
ANSWER_ID = "answer:"
"""How converters begin the `target_id` of a short answer, which is text."""
TEXT_ID = "content-text:"
MEDIA_ID = "content-media:"
_CONTENT = hashlib.sha256(b"content").digest()
STATED_CONTENT = re.compile(rf"(?:{TEXT_ID}|{MEDIA_ID})([0-9a-f]{{32}})")


def content_id(record: PairRecord, media_root: str | Path | None) -> int:
    """Stable id of the target's content in the range of int64: the same on every machine and in every run.

    Ids of a source and contents live in separate spaces: a record with a source's `target_id` never equals one without.
    A `target_id` made by `target_content_id` stands for the content.

    Raises:
        MediaError: a medium that has to be hashed is missing or refused.
    """
    stated = STATED_CONTENT.fullmatch(record.target_id)
    if stated:
        return _to_int64(bytes.fromhex(stated[1]))
    if record.target_id:
        return _to_int64(_digest([b"id", record.target_id.encode()]))
    return _to_int64(_item_digest(record.target, media_root))


def target_content_id(text: str, images: Sequence[bytes] = (), frames: Sequence[bytes] = ()) -> str:
    """The `target_id` of a content: "content-text:<hex>", or "content-media:<hex>" if it has images or a video.

    Args:
        text: the target's text, as `normalise_text` returns it.
        images: SHA-256 of each image's bytes, in order.
        frames: SHA-256 of each frame's bytes, or the one of the video file.
    """
    if not images and not frames:
        return TEXT_ID + _content_digest(text, []).hex()[:32]
    return MEDIA_ID + _content_digest(text, _media_parts(images, frames)).hex()[:32]


def normalise_text(text: str) -> str:
    """Text without differences that do not change its content: case, width, composed accents, white space."""
    composed = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(composed.casefold().split())


def media_digest(media: Media, media_root: str | Path | None) -> bytes:
    """SHA-256 of the encoded bytes, whether they come as bytes or in a file.

    Raises:
        MediaError: the path is refused, or the file is missing or cannot be read.
    """
    if isinstance(media, bytes):
        return hashlib.sha256(media).digest()
    digest = hashlib.sha256()
    try:
        with open(resolve_media_path(media, media_root), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise MediaError(f"media path {media!r}: cannot be read ({error})") from error
    return digest.digest()


def _item_digest(item: Item, media_root: str | Path | None) -> bytes:
    video: tuple[Media, ...] = ()
    if item.video is not None:
        video = item.video.frames if item.video.path is None else (item.video.path,)
    images = [media_digest(media, media_root) for media in item.images]
    frames = [media_digest(media, media_root) for media in video]
    return _content_digest(normalise_text(item.text), _media_parts(images, frames))


def _content_digest(text: str, media: list[bytes]) -> bytes:
    """`_digest` of b"content", the text and the media, without the list: it runs once for every pair of a data set."""
    digests = _CONTENT + hashlib.sha256(text.encode()).digest()
    for part in media:
        digests += hashlib.sha256(part).digest()
    return hashlib.sha256(digests).digest()


def _media_parts(images: Sequence[bytes], frames: Sequence[bytes]) -> list[bytes]:
    return [b"image" + digest for digest in images] + [b"frame" + digest for digest in frames]


def _digest(parts: list[bytes]) -> bytes:
    """SHA-256 of a list of strings; each is hashed first, so that moving a border between two changes the result."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _to_int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def records_digest(records: Iterable[PairRecord], media_root: str | Path | None) -> str:
    """Changes with the order of records and with any of their fields; of a medium in a file, with its path and size."""

    def plain(media: object) -> str:
        if isinstance(media, bytes):
            return hashlib.sha256(media).hexdigest()
        assert isinstance(media, str), type(media)
        return f"{media}:{resolve_media_path(media, media_root).stat().st_size}"

    def item(one: Item) -> dict[str, object]:
        clip = one.video
        video = clip and [plain(part) for part in (clip.frames or (clip.path,))] + [clip.fps]
        media = {"images": [plain(image) for image in one.images], "video": video}
        return {"text": one.text, "instruction": one.instruction, "kind": one.kind, "tcot": one.tcot, **media}

    digest = hashlib.sha256()
    for record in records:
        ids = [record.pair_id, record.data_source, record.instruction, record.target_id]
        sides = [item(one) for one in (record.query, record.target, *record.negatives)]
        digest.update(json.dumps([ids, sides], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
