# SPDX-License-Identifier: Apache-2.0
"""The roster of a data set: source, contents and verdict of every pair as small integers, in order.

It takes 36 bytes a pair, whatever the pairs hold, and everything that is decided over a whole data set (who is drawn,
which ids come twice) is decided on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedrl_verl.curate.content_ids import rejection
from embedrl_verl.curate.records import batches, rows_at
from embedrl_verl.curate.validity import bad_rows
from embedrl_verl.curate.verdict_file import VERDICTS, verdict_batches
from embedrl_verl.data.identity import ANSWER_ID, TEXT_ID
from embedrl_verl.errors import DataError

NO_VERDICT = -1
NAMED = 5
CHECKED_AT_ONCE = 1024
Index = npt.NDArray[np.int64]


@dataclass
class Roster:
    """All rows of several files.

    Attributes:
        files: in order.
        starts: int64 (files + 1,), number of the first row of each file over all rows, and their total.
        names: data sources, by code.
        pair: int64 (rows,), hash of the pair_id; comparable within this process only.
        source: int16 (rows,), code of the data source; -1 where the row is rejected.
        content, query: int64 (rows,), hash of the target_id, and of the query_id; 0 where it is empty.
        is_text: bool (rows,), the target_id stands for a text without media.
        verdict: int8 (rows,), index in `VERDICTS`, or -1.
        rejected: lines of `rejected.jsonl`, of rows without an id or source and of second pairs of an id.
    """

    files: list[Path]
    starts: Index
    names: list[str]
    pair: Index
    source: npt.NDArray[np.int16]
    content: Index
    query: Index
    is_text: npt.NDArray[np.bool_]
    verdict: npt.NDArray[np.int8]
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """Rows that are not rejected; bool (rows,)."""
        return self.source >= 0

    def place(self, row: int) -> tuple[Path, int]:
        """File, and row of the file from 0, of a row over all files."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[file], row - int(self.starts[file])

    def pair_ids(self, rows: Sequence[int]) -> list[str]:
        """The pair_ids of a few rows, ascending."""
        return [batch[0][0].as_py() or "" for batch in self._rows_at(rows, ["pair_id"])]

    def check(self, rows: Sequence[int]) -> None:
        """Reject those of these rows (ascending) that are no pair records."""
        for row, batch in zip(rows, self._rows_at(rows, None), strict=True):
            file, number = self.place(row)
            for error in bad_rows(batch, file, number).values():
                self.reject(row, error, batch["pair_id"][0].as_py())

    def reject(self, row: int, error: DataError, pair_id: str | None) -> None:
        """Take a row out."""
        self.source[row] = -1
        self.rejected.append(rejection(*self.place(row), error, pair_id))

    def _rows_at(self, rows: Sequence[int], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        for file, start, stop in zip(self.files, self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            yield from rows_at(file, [row - start for row in rows if start <= row < stop], columns)


def read_roster(files: Sequence[Path]) -> Roster:
    """Read the roster of files: four columns of them."""
    codes: dict[str, int] = {}
    starts, pairs, sources, contents, queries, texts = [0], [], [], [], [], []
    for file in files:
        rows = 0
        for _, batch in batches(file, ["pair_id", "data_source", "target_id", "query_id"]):
            rows += batch.num_rows
            pairs.append(_hashes(batch["pair_id"]))
            sources.append(_codes(batch["data_source"], codes))
            contents.append(_hashes(batch["target_id"]))
            queries.append(_hashes(batch["query_id"]))
            names = batch["target_id"]
            is_text = pc.or_(pc.starts_with(names, TEXT_ID), pc.starts_with(names, ANSWER_ID))
            texts.append(pc.fill_null(is_text, False).to_numpy(zero_copy_only=False))
        starts.append(starts[-1] + rows)
    roster = Roster(
        files=list(files),
        starts=np.array(starts, np.int64),
        names=list(codes),
        pair=np.concatenate([np.zeros(0, np.int64), *pairs]),
        source=np.concatenate([np.zeros(0, np.int16), *sources]),
        content=np.concatenate([np.zeros(0, np.int64), *contents]),
        query=np.concatenate([np.zeros(0, np.int64), *queries]),
        is_text=np.concatenate([np.zeros(0, np.bool_), *texts]),
        verdict=np.full(starts[-1], NO_VERDICT, np.int8),
    )
    roster.check(np.flatnonzero((roster.pair == 0) | (roster.source < 0)).tolist())
    _reject_doubles(roster)
    return roster


def read_verdicts(roster: Roster, path: Path) -> None:
    """Fill in the verdicts of a parquet file (columns pair_id and verdict, one row a pair, in any order).

    A pair of the data without a verdict is checked: if it is no record, it is rejected, and needs no verdict.
    """
    order = np.argsort(roster.pair, kind="stable")
    order = order[roster.good[order]]
    known = roster.pair[order]
    faults = {"have no pair in the data": Sample(), "come twice": Sample()}
    row = 0
    for ids, verdicts in verdict_batches(path):
        hashes = _hashes(ids)
        at = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
        found = known[at] == hashes if len(known) else np.zeros(len(hashes), np.bool_)
        rows = order[at[found]] if len(known) else at[:0]
        twice = found.copy()
        twice[found] = (roster.verdict[rows] != NO_VERDICT) | _repeats(rows)
        faults["have no pair in the data"].add(ids, ~found)
        faults["come twice"].add(ids, twice)
        roster.verdict[rows] = _verdict_codes(verdicts, path, row)[found]
        row += len(hashes)
    missing = np.flatnonzero(roster.good & (roster.verdict == NO_VERDICT))
    for start in range(0, len(missing), CHECKED_AT_ONCE):
        roster.check(missing[start : start + CHECKED_AT_ONCE].tolist())
        if (roster.good[missing[: start + CHECKED_AT_ONCE]]).any():
            break  # there is a good pair without a verdict: no need to look at more of them
    missing = np.flatnonzero(roster.good & (roster.verdict == NO_VERDICT))
    texts = [f"{sample.count} verdicts {fault}: {sample}" for fault, sample in faults.items() if sample.count]
    if len(missing):
        named = roster.pair_ids(missing[:NAMED].tolist())
        texts.insert(0, f"{len(missing)} pairs have no verdict: {_listed(named, len(missing))}")
    if texts:
        raise DataError(
            f"{path} must have exactly one verdict for each pair of the data. {'; '.join(texts)}. "
            "Make the verdicts from these files, with embedrl data filter"
        )


@dataclass
class Sample:
    """How many there are, and the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, ids: pa.Array, marked: npt.NDArray[np.bool_]) -> None:
        """Add the marked ids."""
        self.count += int(marked.sum())
        places = np.flatnonzero(marked)[: NAMED - len(self.first)]
        self.first += [str(ids[place].as_py()) for place in places.tolist()]

    def __str__(self) -> str:
        return _listed(self.first, self.count)


def _listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")


def _reject_doubles(roster: Roster) -> None:
    """Reject all but the first row of a pair_id. Equal hashes are compared as ids."""
    order = np.argsort(roster.pair, kind="stable")
    order = order[roster.good[order]]
    same = roster.pair[order[1:]] == roster.pair[order[:-1]]
    if not same.any():
        return
    rows = np.unique(np.concatenate([order[1:][same], order[:-1][same]])).tolist()
    first: dict[str, int] = {}
    for row, pair_id in zip(rows, roster.pair_ids(rows), strict=True):
        if pair_id in first:
            file, number = roster.place(first[pair_id])
            here, place = roster.place(row)
            reason = f"{here}, row {place}: field pair_id: must be unique; {file}, row {number} has {pair_id!r} too"
            roster.reject(row, DataError(reason), pair_id)
        else:
            first[pair_id] = row


def _verdict_codes(verdicts: pa.Array, path: Path, first_row: int) -> npt.NDArray[np.int8]:
    codes = pc.fill_null(pc.index_in(verdicts, pa.array(VERDICTS)), NO_VERDICT).to_numpy(zero_copy_only=False)
    if len(bad := np.flatnonzero(codes < 0)):
        place = int(bad[0])
        raise DataError(
            f"{path}, row {first_row + place}: verdict must be one of {', '.join(VERDICTS)}; "
            f"got {verdicts[place].as_py()!r}"
        )
    small: npt.NDArray[np.int8] = codes.astype(np.int8)
    return small


def _hashes(values: pa.Array) -> Index:
    """Hashes of strings; 0 where empty. Python's own are the fastest there are, and differ between processes."""
    names = values.to_pylist()
    return np.fromiter((hash(name) if name else 0 for name in names), np.int64, len(names))


def _codes(values: pa.Array, codes: dict[str, int]) -> npt.NDArray[np.int16]:
    """Codes of strings, new ones added; -1 where empty."""
    encoded = values.dictionary_encode()
    table = [codes.setdefault(name, len(codes)) if name else -1 for name in encoded.dictionary.to_pylist()]
    if len(codes) > np.iinfo(np.int16).max:
        raise DataError(f"at most {np.iinfo(np.int16).max} data sources can be split together; there are more")
    indices = pc.fill_null(encoded.indices, len(table)).to_numpy(zero_copy_only=False)
    found: npt.NDArray[np.int16] = np.array([*table, -1], np.int16)[indices]
    return found


def _repeats(rows: Index) -> npt.NDArray[np.bool_]:
    """True where a value stood before."""
    repeats = np.ones(len(rows), np.bool_)
    repeats[np.unique(rows, return_index=True)[1]] = False
    return repeats
