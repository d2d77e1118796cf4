# SPDX-License-Identifier: Apache-2.0
"""Which rows of an Arrow batch are no pair records: the rules of `embedrl_verl.data.parquet`, on whole columns.

The columns are asked which rows *may* break a rule; only those become Python objects, and `record_or_error` decides and
words the error. So the outcome is that of `scan_pairs`, at the cost of a few passes over offsets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedrl_verl.data.parquet import record_or_error
from embedrl_verl.errors import DataError

Mask = npt.NDArray[np.bool_]
BLANK = r"^[\p{Z}\x{0}-\x{20}\x{7f}-\x{a0}]*$"  # at least everything that str.strip() strips


def bad_rows(batch: pa.RecordBatch, file: str | Path, rows: int | npt.NDArray[np.int64]) -> dict[int, DataError]:
    """The rows that are no pair records.

    Args:
        batch: rows in `embedrl_verl.data.parquet.SCHEMA`.
        file: named in the errors.
        rows: number of each row in the file (from 0), or of the first one if they follow each other.

    Returns:
        index in the batch → error, in the order of the rows.
    """
    suspects = is_empty(batch["pair_id"]) | is_empty(batch["data_source"])
    suspects |= _item_suspects(batch["query"]) | _item_suspects(batch["target"])
    negatives = batch["negatives"]
    suspects |= _by_parent(negatives, _item_suspects(pc.list_flatten(negatives)))
    errors: dict[int, DataError] = {}
    for index in np.flatnonzero(suspects).tolist():
        number = rows + index if isinstance(rows, int) else int(rows[index])
        result = record_or_error(batch.slice(index, 1).to_pylist()[0], file, number)
        if isinstance(result, DataError):
            errors[index] = result
    return errors


def has_media(items: pa.StructArray) -> Mask:
    """Rows of an item column that have images or a video; shape (rows,)."""
    images, video = items.flatten()[1:3]
    found: Mask = (_lengths(images) > 0) | _mask(pc.is_valid(video))
    return found


def is_empty(values: pa.Array) -> Mask:
    """Strings (or bytes) that are null or of length 0; shape (rows,)."""
    empty: Mask = pc.fill_null(pc.equal(pc.binary_length(values), 0), True).to_numpy(zero_copy_only=False)
    return empty


def _item_suspects(items: pa.StructArray) -> Mask:
    text, images, video, kind, _, _ = items.flatten()
    pictures = _lengths(images)
    is_page = _mask(pc.equal(kind, "page"))
    suspects = _mask(pc.is_null(items)) | _media_suspects(images) | _video_suspects(video)
    suspects |= _mask(pc.is_valid(kind)) & ~is_page
    suspects |= is_page & (pictures == 0)
    bare = (pictures == 0) & ~_mask(pc.is_valid(video))
    bare &= ~_begins_in_print(text)
    if bare.any():
        rows = np.flatnonzero(bare)
        blank = pc.match_substring_regex(pc.fill_null(text.take(pa.array(rows)), ""), BLANK)
        suspects[rows] |= _mask(blank)
    return suspects


def _video_suspects(video: pa.StructArray) -> Mask:
    present = _mask(pc.is_valid(video))
    if not present.any():
        return np.zeros(len(video), np.bool_)
    frames, path, fps = video.flatten()
    has_frames, has_path = _lengths(frames) > 0, ~is_empty(path)
    good_rate = _mask(pc.and_(pc.is_finite(fps), pc.greater(fps, 0)))
    suspects = (has_frames == has_path) | (_mask(pc.is_valid(fps)) & ~good_rate)
    found: Mask = present & (suspects | _media_suspects(frames))
    return found


def _media_suspects(media: pa.ListArray) -> Mask:
    path, content = pc.list_flatten(media).flatten()
    return _by_parent(media, is_empty(path) & is_empty(content))


def _by_parent(lists: pa.ListArray, elements: Mask) -> Mask:
    """Rows of which an element is marked."""
    rows = np.zeros(len(lists), np.bool_)
    if elements.any():
        rows[pc.list_parent_indices(lists).to_numpy()[elements]] = True
    return rows


def _begins_in_print(text: pa.Array) -> Mask:
    """Strings whose first character is a printing one of ASCII: most of those that are not blank, at no cost."""
    _, borders, characters = text.buffers()
    if len(text) == 0 or characters is None or characters.size == 0:
        return np.zeros(len(text), np.bool_)
    starts = np.frombuffer(borders, np.int32)[text.offset : text.offset + len(text) + 1]
    first = np.frombuffer(characters, np.uint8)[np.minimum(starts[:-1], characters.size - 1)]
    found: Mask = (starts[1:] > starts[:-1]) & (first > 0x20) & (first < 0x7F) & _mask(pc.is_valid(text))
    return found


def _lengths(lists: pa.ListArray) -> npt.NDArray[np.int32]:
    lengths: npt.NDArray[np.int32] = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lengths


def _mask(values: pa.Array) -> Mask:
    """Booleans, null as False."""
    mask: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask
