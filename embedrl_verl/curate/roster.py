# SPDX-License-Identifier: Apache-2.0
"""The roster of a data set: id, source, contents and verdict of every pair, in order, as columns of small numbers.

Everything that is decided over a whole data set (who is drawn, which ids come twice) is decided on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedrl_verl.annotate.verdict_file import VERDICTS, verdict_batches
from embedrl_verl.data.build import rejection
from embedrl_verl.data.identity import ANSWER_ID, TEXT_ID
from embedrl_verl.data.parquet import read_batches, read_rows, record_or_error
from embedrl_verl.errors import DataError

NAMED = 5
COLUMNS = ["pair_id", "data_source", "target_id", "query_id"]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Roster:
    """All rows of several files, numbered from 0 over all of them; file number i has those from `starts[i]` on.

    Each row has positions of its id (`pair`, in `ids`) and source (`source`, in `names`), hashes of target_id and
    query_id (`content`, `query`; 0 where empty; comparable within this process only), whether its target is text alone
    (`is_text`), its position in `VERDICTS` or -1 (`verdict`), and whether it is not rejected (`good`). `first` is the
    first good row of each id, or -1; `rejected` has lines of `rejected.jsonl` by row.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, starts, codes = list(files), [0], dict[str, int]()
        batches: list[list[Any]] = [[pa.array([], pa.large_string()), *np.zeros((4, 0), np.int64)]]
        for file in files:
            starts.append(starts[-1])
            for _, batch in read_batches(file, COLUMNS):
                names, sources, contents, queries = (column.fill_null("") for column in batch.columns)
                is_text = pc.or_(pc.starts_with(contents, TEXT_ID), pc.starts_with(contents, ANSWER_ID))
                source = [codes.setdefault(name, len(codes)) for name in sources.to_pylist()]
                hashes = [[*map(hash, column.to_pylist())] for column in (contents, queries)]  # that of "" is 0
                batches.append([names.cast(pa.large_string()), *np.array([source, *hashes, is_text.to_pylist()])])
                starts[-1] += batch.num_rows
        pair_ids, *columns = zip(*batches, strict=True)
        self.source, self.content, self.query, is_text = map(np.concatenate, columns)
        encoded = pa.chunked_array(pair_ids).combine_chunks().dictionary_encode()
        self.ids, self.pair = encoded.dictionary, encoded.indices.to_numpy()
        self.starts, self.names, self.is_text = np.array(starts), [*codes], is_text.astype(np.bool_)
        self.verdict, self.good, self.judged = np.full(starts[-1], -1, np.int8), np.ones(starts[-1], np.bool_), False
        self.rejected: dict[int, dict[str, Any]] = {}
        self.check(np.flatnonzero((self.pair == self.ids.index("").as_py()) | (self.source == codes.get("", -1))))
        good = np.flatnonzero(self.good)[::-1]
        self.first = np.full(len(self.ids), -1)
        self.first[self.pair[good]] = good  # the last assignment stays
        for row in np.flatnonzero(self.good & (self.first[self.pair] != np.arange(len(self)))):
            (other, _, place), pair_id = self.pieces(self.first[self.pair[[row]]])[0], self.ids[self.pair[row]].as_py()
            self.reject(row, DataError(f"field pair_id: must be unique; {other}, row {place[0]} has {pair_id!r} too"))

    def __len__(self) -> int:
        return len(self.pair)

    def pieces(self, rows: Index) -> list[tuple[Path, int, Index]]:
        """Ascending rows by file: the file, the number of its first row, and the rows as it numbers them itself."""
        borders = np.searchsorted(rows, self.starts)
        pieces = zip(self.files, self.starts.tolist(), borders, borders[1:], strict=False)
        return [(file, start, rows[low:high] - start) for file, start, low, high in pieces if low < high]

    def reject(self, row: int, error: DataError) -> None:
        """Take a row out."""
        ((file, _, (number,)),) = self.pieces(np.array([row]))
        self.good[row] = False
        self.rejected[row] = rejection(file, int(number), error, self.ids[self.pair[row]].as_py())

    def check(self, rows: Index) -> None:
        """Reject those of these rows (ascending) that are no pair records."""
        for file, start, numbers in self.pieces(rows):
            for here, batch in read_rows(file, numbers):
                for number, values in zip(here.tolist(), batch.to_pylist(), strict=True):
                    found = record_or_error(values, file, number)
                    if isinstance(found, DataError):
                        self.reject(start + number, found)


def read_verdicts(roster: Roster, path: Path) -> None:
    """Fill in the verdicts of a parquet file (columns pair_id and verdict, one row a pair, in any order).

    A pair of the data without a verdict is checked: if it is no record, it is rejected, and needs no verdict. Raises
    DataError: a good pair has no verdict, a verdict has no pair, or a pair has two verdicts; the message names them.
    """
    batches = [*verdict_batches(path)]
    ids, verdicts = (pa.chunked_array([batch[at] for batch in batches], pa.string()) for at in (0, 1))
    ids, codes = ids.cast(pa.large_string()), pc.index_in(verdicts, pa.array(VERDICTS)).fill_null(-1).to_numpy()
    if len(bad := np.flatnonzero(codes < 0)):
        got = verdicts[bad[0]].as_py()
        raise DataError(f"{path}, row {bad[0]}: verdict must be one of {', '.join(VERDICTS)}; got {got!r}")
    rows = np.append(roster.first, -1)[pc.index_in(ids, roster.ids).fill_null(-1).to_numpy()]
    repeats = rows >= 0
    repeats[np.unique(rows, return_index=True)[1]] = False
    roster.verdict[rows[rows >= 0]], roster.judged = codes[rows >= 0], True
    roster.check(np.flatnonzero(roster.good & (roster.verdict < 0)))
    faults = {
        "pairs have no verdict": roster.ids.take(pa.array(roster.pair[roster.good & (roster.verdict < 0)])),
        "verdicts have no pair in the data": ids.filter(pa.array(rows < 0)),
        "verdicts come twice": ids.filter(pa.array(repeats)),
    }
    listed = [
        f"{len(names)} {fault}: {', '.join(map(str, names[:NAMED].to_pylist()))}"
        + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for fault, names in faults.items()
        if len(names)
    ]
    if listed:
        raise DataError(
            f"{path} must have exactly one verdict for each pair of the data. {'; '.join(listed)}. "
            "Make the verdicts from these files, with embedrl data filter"
        )
