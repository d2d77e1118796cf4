# SPDX-License-Identifier: Apache-2.0
"""The rows of the input, streamed: a record each, or the line of `rejected.jsonl` that says why it is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa

from embedrl_verl.data.build import rejection
from embedrl_verl.data.parquet import Span, read_batches, scan_rows, spans
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.data.table import first_rows
from embedrl_verl.errors import DataError

Rejection: TypeAlias = dict[str, Any]


class Rows:
    """Files of pair records, in spans of about `rows_per_part` rows: row groups stay whole."""

    def __init__(self, files: Sequence[Path], rows_per_part: int) -> None:
        self.spans = spans(files, rows_per_part)
        self.count = sum(span.stop - span.start for span in self.spans)
        if not self.count:
            raise DataError(f"no row in {', '.join(map(str, files)) or 'no file'}; name files with pair records")
        batches = [[batch.column(0) for _, batch in read_batches(file, ["pair_id"])] for file in files]
        ids = pd.concat({at: pa.chunked_array(found, pa.string()).to_pandas() for at, found in enumerate(batches)})
        self._repeated = {
            (files[at], row): DataError(
                f"field pair_id: pair_id must be unique; {files[other]}, row {first} has it too"
            )
            for (at, row), (other, first) in first_rows(ids[ids.fillna("") != ""]).items()
        }

    def scan(self, span: Span) -> Iterator[tuple[int, PairRecord | Rejection]]:
        """Every row number (from 0 over the file), in order. A pair id that an earlier row has makes a row unusable."""
        for row, values, record in scan_rows(span):
            found = self._repeated.get((span.file, row), record)
            if isinstance(found, DataError):
                yield row, rejection(span.file, row, found, values["pair_id"])
            else:
                yield row, found
