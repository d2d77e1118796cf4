# SPDX-License-Identifier: Apache-2.0
"""The file of relevance verdicts: one row a pair, columns `pair_id` and `verdict`. `embedrl data filter` writes it,
`embedrl data split` and `embedrl data show` read it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedrl_verl.data.files import VERDICTS_FILE
from embedrl_verl.errors import DataError

Verdict: TypeAlias = Literal["match", "mismatch", "unknown"]
VERDICTS: tuple[Verdict, ...] = ("match", "mismatch", "unknown")
VERDICTS_FOLDER = "verdicts"
VERDICT_SCHEMA = pa.schema([("pair_id", pa.string()), ("verdict", pa.string())])
ROWS_AT_ONCE = 2048


def verdict_batches(path: Path) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Pair ids and verdicts, in order; the verdicts are as they stand there."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in ("pair_id", "verdict") if name not in names]:
                raise DataError(f"{path}: column {missing[0]!r} is missing; the file has {', '.join(names)}")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["pair_id", "verdict"], use_threads=False):
                yield batch["pair_id"].cast(pa.string()), batch["verdict"].cast(pa.string())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file of verdicts ({error})") from error


def verdict_files_of(files: Iterable[Path]) -> list[Path]:
    """The verdict files in the folders of these files, or where `embedrl data filter` puts them."""
    found: dict[Path, None] = {}
    for folder in dict.fromkeys(file.resolve().parent for file in files):
        for place in (folder, folder / VERDICTS_FOLDER, folder.parent / VERDICTS_FOLDER):
            if (place / VERDICTS_FILE).is_file():
                found[place / VERDICTS_FILE] = None
                break
    return list(found)


def verdicts_of(paths: Iterable[Path], pair_ids: Collection[str]) -> dict[str, str]:
    """The verdicts of these pairs; of several files the first that has a pair counts."""
    wanted, found = pa.array(sorted(pair_ids), pa.string()), dict[str, str]()
    for path in paths:
        for ids, verdicts in verdict_batches(path):
            rows = pc.is_in(ids, wanted)
            for name, verdict in zip(ids.filter(rows).to_pylist(), verdicts.filter(rows).to_pylist(), strict=True):
                found.setdefault(name, verdict or "")
    return found
