# SPDX-License-Identifier: Apache-2.0
"""One media root for pairs that come from several data set folders, each with a root of its own.

A run has one `data.media_root`. When folders are merged, it becomes the folder that all roots share, and each media
path gets in front what leads from there to its old root: `x.png` of `/data/okvqa/media` becomes `okvqa/media/x.png` of
`/data`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from embedrl_verl.curate.records import with_values
from embedrl_verl.data.files import media_root_of
from embedrl_verl.errors import ConfigError


def merged_root(files: Sequence[Path], media_root: str | None) -> tuple[str | None, dict[Path, str]]:
    """The media root of files together, absolute, and for each file what its media paths get in front ("" = nothing).

    Args:
        files: parquet files; the data card beside a file tells its root.
        media_root: the root of all files, instead.
    """
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
    return shared, {file: "" if not root or ahead[root] == "." else ahead[root] for file, root in roots.items()}


def with_prefix(batch: pa.RecordBatch, prefix: str) -> pa.RecordBatch:
    """The batch (in `embedrl_verl.data.parquet.SCHEMA`) with `prefix`/ in front of every media path."""
    if not prefix:
        return batch
    columns = [
        _prefixed(column, prefix) if name in ("query", "target", "negatives") else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _prefixed(array: pa.Array, prefix: str) -> pa.Array:
    """Recursive over lists and structs; the fields called path are media paths."""
    kind = array.type
    if pa.types.is_list(kind):
        return with_values(array, _prefixed(pc.list_flatten(array), prefix), kind)
    if pa.types.is_struct(kind):
        children = []
        for field, child in zip(kind, array.flatten(), strict=True):
            if field.name == "path":
                children.append(_joined(prefix, child))
            else:
                children.append(_prefixed(child, prefix))
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    return array


def _joined(prefix: str, paths: pa.Array) -> pa.Array:
    """Null and "" stay; so do absolute paths, which are refused wherever they are read."""
    stays = pc.or_kleene(pc.equal(pc.binary_length(paths), 0), pc.starts_with(paths, "/"))
    return pc.if_else(stays, paths, pc.binary_join_element_wise(prefix, paths, "/"))
