# SPDX-License-Identifier: Apache-2.0
"""One media root for pairs of several data set folders, each with a root of its own: the folder that all roots share.
`x.png` of `/data/okvqa/media` becomes `okvqa/media/x.png` of `/data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from embedrl_verl.data.files import media_root_of
from embedrl_verl.data.schema import Item, Media, PairRecord
from embedrl_verl.errors import ConfigError, DataError


def merged_root(files: Sequence[Path], media_root: str | None) -> tuple[str | None, dict[Path, str | None]]:
    """The media root of files together, absolute, and what the media paths of each file get in front: "" is nothing,
    None that it may have none, since others have a root and it has not. Without a `media_root` for all, the data card
    beside a file tells its own."""
    if media_root is not None:
        return os.path.abspath(media_root), dict.fromkeys(files, "")
    roots = {file: root and os.path.abspath(root) for file, root in ((file, media_root_of(file)) for file in files)}
    known = sorted({root for root in roots.values() if root})
    if not known:
        return None, dict.fromkeys(files, "")
    shared = os.path.commonpath(known)
    if len(known) > 1 and shared == os.path.dirname(shared):
        raise ConfigError(f"media roots {', '.join(known)} share no folder; move them together, or embed the media")
    ahead = {root: os.path.relpath(root, shared) for root in known}
    return shared, {file: root and ("" if ahead[root] == "." else ahead[root]) for file, root in roots.items()}


def with_prefix(record: PairRecord, prefix: str | None) -> PairRecord:
    """The record with `prefix`/ in front of every media path. Absolute ones stay: they are refused wherever read.
    DataError: it has a path, and the prefix is None."""
    if prefix == "":
        return record

    def ahead(media: Media) -> Media:
        if prefix is None and isinstance(media, str):
            raise DataError(
                f"media path {media!r} is of no media root: the data card beside the file names none, and other inputs "
                "have one; name one for all (--media-root), or embed the media"
            )
        return media if isinstance(media, bytes) or media.startswith("/") else f"{prefix}/{media}"

    def moved(item: Item) -> Item:
        video = item.video
        if video is not None:
            path = None if video.path is None else str(ahead(video.path))
            video = replace(video, frames=tuple(map(ahead, video.frames)), path=path)
        return replace(item, images=tuple(map(ahead, item.images)), video=video)

    negatives = tuple(map(moved, record.negatives))
    return replace(record, query=moved(record.query), target=moved(record.target), negatives=negatives)
