# SPDX-License-Identifier: Apache-2.0
"""What the jobs of curation share: their report, and one media root for pairs of several data set folders, the folder
that all their roots share. `x.png` of `/data/okvqa/media` becomes `okvqa/media/x.png` of `/data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedrl_verl.data.files import media_root_of
from embedrl_verl.data.schema import Item, Media, PairRecord
from embedrl_verl.errors import ConfigError, DataError


@dataclass(frozen=True)
class JobReport:
    """`values` go to the JSON file; `lines` are for people."""

    values: dict[str, Any]
    lines: list[str]

    @property
    def exit_code(self) -> int:
        """0, or 3 if rows were left out."""
        return DataError.exit_code if self.values["rejected"] else 0


def merged_root(files: Sequence[Path], media_root: str | None) -> tuple[str | None, dict[Path, str | None]]:
    """The media root of files together, absolute, and what the media paths of each file get in front: "" is nothing,
    None that it may have none, since others have a root and it has not. Without a `media_root` for all, the data card
    beside a file tells its own."""
    roots = {file: media_root_of(file) if media_root is None else media_root for file in files}
    known = sorted({os.path.abspath(root) for root in roots.values() if root is not None})
    if not known:
        return None, dict.fromkeys(files, "")
    shared = os.path.commonpath(known)
    if len(known) > 1 and shared == os.path.dirname(shared):
        raise ConfigError(f"media roots {', '.join(known)} share no folder; move them together, or embed the media")
    ahead = {file: None if root is None else os.path.relpath(root, shared) for file, root in roots.items()}
    return shared, {file: "" if path == "." else path for file, path in ahead.items()}


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
