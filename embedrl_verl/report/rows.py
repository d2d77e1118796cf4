# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table are looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedrl_verl.data.table import PairTable
from embedrl_verl.data.video import even_indices
from embedrl_verl.errors import DataError

NO_SOURCE = "(no source)"


def rows_by_source(table: PairTable) -> dict[str, NDArray[np.int64]]:
    names = pc.fill_null(table.column("data_source"), NO_SOURCE).to_pandas(strings_to_categorical=True)
    return dict(sorted(names.groupby(names, observed=True).indices.items()))


def choose(table: PairTable, limit: int, seed: int | None = None) -> list[int]:
    """Numbers of at most `limit` rows, in order; every source has a share by its size, and one row at least. Without a
    seed the rows of a source are evenly spaced from first to last, with one they are drawn at random."""
    if not len(table):
        raise DataError(f"no rows in {', '.join(map(str, table.files))}")
    if limit >= len(table):
        return list(range(len(table)))
    # Small sources first, so that what rounding up takes comes from the large ones.
    sources = sorted(rows_by_source(table).values(), key=len)[-limit:]
    generator = None if seed is None else np.random.default_rng(seed)
    total, left, chosen = sum(map(len, sources)), limit, list[int]()
    for rows in sources:
        size = len(rows)
        share = min(size, max(1, round(left * size / total)))
        total, left = total - size, left - share
        places = even_indices(size, share) if generator is None else generator.choice(size, share, replace=False)
        chosen += rows[places].tolist()
    return sorted(chosen)


def rows_with_ids(table: PairTable, ids: Sequence[str]) -> list[int]:
    """Numbers of the rows with these pair ids, in order."""
    column = table.column("pair_id")
    found = pc.is_in(column, pa.array(ids, pa.string()))
    if missing := set(ids) - set(column.filter(found).to_pylist()):
        raise DataError(f"no row has the pair_id {', '.join(map(repr, sorted(missing)))}")
    return list(map(int, np.flatnonzero(found)))
