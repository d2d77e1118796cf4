# SPDX-License-Identifier: Apache-2.0
"""The rows of the input, streamed: a record each, or the line of `rejected.jsonl` that says why it is none."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from embedrl_verl.data.build import rejection
from embedrl_verl.data.parquet import Span, opened, read_batches, scan_rows, spans
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.data.table import first_rows
from embedrl_verl.errors import DataError

Rejection: TypeAlias = dict[str, Any]


class Rows:
    """Files of pair records, in spans of about `rows_per_part` rows: row groups stay whole."""

    def __init__(self, files: Sequence[Path], rows_per_part: int) -> None:
        self.files, self.spans = list(files), spans(files, rows_per_part)
        self.count = sum(span.stop - span.start for span in self.spans)
        if not self.count:
            raise DataError(f"no row in {', '.join(map(str, files)) or 'no file'}; name files with pair records")
        self._repeated = _repeated(self.files)

    def scan(self, span: Span) -> Iterator[tuple[int, PairRecord | Rejection]]:
        """Every row number (from 0 over the file), in order. A pair id that an earlier row has makes a row unusable."""
        for row, values, record in scan_rows(span):
            found = self._repeated.get((span.file, row), record)
            if isinstance(found, DataError):
                yield row, rejection(span.file, row, found, values["pair_id"])
            else:
                yield row, found


def footer_digest(file: Path) -> str:
    """A digest that changes with the file's content, from its footer: sizes and statistics of all column chunks."""
    with opened(file) as parquet:
        groups = [parquet.metadata.row_group(group).to_dict() for group in range(parquet.metadata.num_row_groups)]
    return hashlib.sha256(repr(groups).encode()).hexdigest()[:32]


def _repeated(files: Sequence[Path]) -> dict[tuple[Path, int], DataError]:
    """Rows whose pair id an earlier row has. All ids are in memory while it runs."""
    columns = [[batch.column(0) for _, batch in read_batches(file, ["pair_id"])] for file in files]
    starts = [0, *itertools.accumulate(sum(map(len, batches)) for batches in columns)]

    def place(number: int) -> tuple[Path, int]:
        at = bisect_right(starts, number) - 1
        return files[at], number - starts[at]

    found = {}
    ids = pa.chunked_array([one for batches in columns for one in batches], pa.string()).to_pandas()
    for number, earlier in first_rows(ids[ids.fillna("") != ""]).items():
        (file, row), (other, first) = place(number), place(earlier)
        reason = f"field pair_id: pair_id must be unique; {other}, row {first} has it too"
        found[file, row] = DataError(f"{file}, row {row}: {reason}")
    return found
