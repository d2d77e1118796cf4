# SPDX-License-Identifier: Apache-2.0
"""Records that have the id of an earlier one, over all parts of a conversion, with some 30 bytes of memory a record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.parquet as pq

from embedrl_verl.convert.parts import PartJob
from embedrl_verl.convert.plan import Unit
from embedrl_verl.convert.rows import Rows, is_jsonl


def find_doubles(
    job: PartJob, units: Mapping[int, Unit], sizes: Sequence[int], limit: int
) -> dict[int, dict[int, str]]:
    """Part -> number of a record in it -> why it is rejected. The first record of an id, in order of the parts, stays.

    Ids are compared by 64-bit hashes, and those that agree as texts. The search ends when more than `limit` are found.
    """
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    hashes = np.concatenate([np.load(job.file(index, ".ids.npy")) for index in range(len(sizes))] or [np.zeros(0)])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    again = hashes[1:] == hashes[:-1]
    if not again.any():
        return {}
    later = np.concatenate([[False], again])
    suspects = np.sort(order[later | np.concatenate([again, [False]])])
    del hashes, order
    first_of: dict[str, int] = {}
    found: dict[int, dict[int, str]] = defaultdict(dict)
    count = 0
    parts = np.searchsorted(starts, suspects, side="right") - 1
    for part in np.unique(parts).tolist():
        numbers = suspects[parts == part] - starts[part]
        for number, pair_id in zip(numbers.tolist(), _pair_ids(job, part, numbers), strict=True):
            first = first_of.setdefault(pair_id, int(starts[part]) + number)
            if first != starts[part] + number:
                found[part][number] = f"must be unique; {_place(job, units, starts, first)} has it too"
                count += 1
                if count > limit:
                    return dict(found)
    return dict(found)


def _pair_ids(job: PartJob, part: int, numbers: Rows) -> list[str]:
    with pq.ParquetFile(job.file(part, ".parquet")) as file:
        ids: list[str] = file.read(columns=["pair_id"]).column(0).take(numbers).to_pylist()
    return ids


def _place(job: PartJob, units: Mapping[int, Unit], starts: Rows, position: int) -> str:
    part = int(np.searchsorted(starts, position, side="right")) - 1
    rows = np.load(job.file(part, ".rows.npy"), mmap_mode="r")
    row, file = int(rows[position - starts[part]]), units[part].shard.file
    return f"{file}, line {row + 1}" if is_jsonl(file) else f"{file}, row {row}"
