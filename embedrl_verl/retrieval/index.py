# SPDX-License-Identifier: Apache-2.0
"""The vectors of a folder that `embedrl embed` wrote, searched exactly or by a graph (HNSW, with FAISS).

Beside the parts there are, made by the first search and named after the data card, so that they are of this folder's
rows: `vectors-*.npy`, float32 (rows, D), NaN where a row has no vector, which is memory-mapped; `hnsw-*.faiss`, which
is read into memory and holds the vectors again. `plain-*.npy` and `hnsw-plain-*.faiss` are those without T-CoTs, of a
folder that has them.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embedrl_verl.data.files import CARD_FILE, disk_errors, pair_files, publish, read_object, sha256_of, temporary_name
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.retrieval.embed import FORMAT

Kind = Literal["exact", "hnsw"]
BLOCK = 65536
"""Vectors that are compared, or added to a graph, at a time."""
NEIGHBOURS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 128
"""HNSW: links of a vector, and candidates looked at when it is added and when a query is searched."""
TOP, GOOD_RECALL = 10, 0.9
"""Of a graph that has just been made: how many rows it is asked for, and below which share it is warned of."""
logger = logging.getLogger(__name__)

Found = tuple[torch.Tensor, torch.Tensor]
"""Cosines, float32 (Q, k), best first, and rows, int64 (Q, k); -inf and -1 where there are fewer than k vectors."""


class Hit(NamedTuple):
    """A row that was found, by its number in the folder; its cosine with the query."""

    score: float
    row: int
    id: str
    tcot: str | None


class Index:
    """See the module.

    Attributes:
        folder: where it is.
        settings: of the command that wrote the folder.
        models: its `PairOptions.stamps`.
        inputs: its `Inputs.facts`.
        vectors: float32 (rows, D), memory-mapped.

    Raises:
        DataError: the folder is unfinished, or holds no vectors.
        ConfigError: FAISS is not installed.
    """

    def __init__(self, folder: str | Path, kind: Kind = "exact") -> None:
        self.folder, self._kind = Path(folder), kind
        self._parts = pair_files([folder])
        card = read_object(Path(folder) / CARD_FILE)
        if card.get("format") != FORMAT:
            raise DataError(
                f"{folder} holds {card.get('format')!r}, not vectors; name a folder that embedrl embed wrote"
            )
        self.settings: dict[str, Any] = card["build"]["settings"]
        self.inputs: list[dict[str, Any]] = card["build"]["input"]
        self.models: dict[str, list[str]] = card["models"]
        self._ends = list(accumulate(part["records"] for part in card["parts"]))
        self._dim, self._name = card["dim"], sha256_of(Path(folder) / CARD_FILE)[:12]
        self.vectors, self._graph = self._column("vector", "vectors", "hnsw")

    @property
    def has_plain(self) -> bool:
        """Whether there are vectors without T-CoTs beside those with."""
        return bool(self.settings.get("with_plain"))

    @cached_property
    def _plain(self) -> tuple[npt.NDArray[np.float32], Any]:
        return self._column("plain", "plain", "hnsw-plain")

    def _column(self, column: str, name: str, graph: str) -> tuple[npt.NDArray[np.float32], Any]:
        """Vectors of a column, float32 (rows, D), and their graph, None where all are compared."""
        file = self.folder / f"{name}-{self._name}.npy"
        if not file.is_file():
            self._write_vectors(file, column)
        # Copy-on-write, of which nothing is written: torch warns of memory that cannot be.
        vectors = np.load(file, mmap_mode="c")
        return vectors, _graph(self.folder / f"{graph}-{self._name}.faiss", vectors) if self._kind == "hnsw" else None

    def search(self, queries: torch.Tensor, top: int, *, plain: bool = False) -> Found:
        """The `top` best rows of each query; queries: float32 (Q, D) of length 1. `plain`: among the vectors without
        T-CoTs, of a folder that has them."""
        vectors, graph = self._plain if plain else (self.vectors, self._graph)
        if queries.shape[1] != self._dim:
            raise ConfigError(
                f"queries must have the folder's {self._dim} numbers a vector; the Embedder gives "
                f"{queries.shape[1]}. Use the one that the folder was embedded with"
            )
        if graph is not None:
            scores, rows = map(torch.from_numpy, graph.search(queries.numpy(), top))
            return scores.masked_fill(rows < 0, -torch.inf), rows
        return exact(torch.from_numpy(vectors), queries, top)

    def hits(self, scores: torch.Tensor, rows: torch.Tensor) -> list[Hit]:
        """What one query has found, scores and rows (k,), with its ids."""
        return [self.hit(score, row) for score, row in zip(scores.tolist(), rows.tolist(), strict=True) if row >= 0]

    def place(self, row: int) -> tuple[int, int]:
        """The part of a row, and its number there, both from 0."""
        part = bisect_right(self._ends, row)
        return part, row - (self._ends[part - 1] if part else 0)

    def hit(self, score: float, row: int) -> Hit:
        """A row with its id and T-CoT."""
        part, offset = self.place(row)
        table = pq.read_table(self._parts[part], columns=["id", "tcot"])
        values = table.slice(offset, 1).to_pylist()[0]
        return Hit(score, row, values["id"], values["tcot"])

    def _write_vectors(self, file: Path, name: str) -> None:
        dim, temporary = self._dim, temporary_name(file)
        with disk_errors(file):
            try:
                shape = (self._ends[-1], dim)
                written = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
                start = 0
                for part in self._parts:
                    column = pq.read_table(part, columns=[name])[name].combine_chunks()
                    rows = written[start : start + len(column)]
                    rows[:] = np.nan
                    rows[column.is_valid().to_numpy(zero_copy_only=False)] = (
                        pc.list_flatten(column).to_numpy().reshape(-1, dim)
                    )
                    start += len(column)
                written.flush()
                del written
                publish(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)


def exact(vectors: torch.Tensor, queries: torch.Tensor, top: int) -> Found:
    """Every vector compared, a block at a time; NaN vectors are not found. Of equal cosines any may come first."""
    best = torch.full((len(queries), top), -torch.inf), torch.full((len(queries), top), -1, dtype=torch.int64)
    for start in range(0, len(vectors), BLOCK):
        similarity = (queries @ vectors[start : start + BLOCK].T).nan_to_num(nan=-torch.inf)
        scores, rows = similarity.topk(min(top, similarity.shape[1]), dim=1)
        rows = (rows + start).masked_fill(scores == -torch.inf, -1)
        scores, order = torch.cat([best[0], scores], dim=1).topk(top, dim=1)
        best = scores, torch.cat([best[1], rows], dim=1).gather(1, order)
    return best


def _graph(file: Path, vectors: npt.NDArray[np.float32]) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("--index hnsw needs FAISS: pip install faiss-cpu; or use --index exact") from error
    if is_new := not file.is_file():
        inner: Any = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        inner.hnsw.efConstruction = BUILD_WIDTH
        graph: Any = faiss.IndexIDMap(inner)
        for start in range(0, len(vectors), BLOCK):
            block = vectors[start : start + BLOCK]
            known = ~np.isnan(block[:, 0])
            graph.add_with_ids(block[known], np.flatnonzero(known) + start)
        temporary = temporary_name(file)
        with disk_errors(file):
            try:
                faiss.write_index(graph, str(temporary))
                publish(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
    read: Any = faiss.read_index(str(file))
    inner = faiss.downcast_index(read.index)
    inner.hnsw.efSearch = SEARCH_WIDTH
    if is_new and (share := recall(read, vectors)) < GOOD_RECALL:
        logger.warning(
            "%s finds %.0f%% of the %d closest vectors of vectors of its own; --index exact finds all",
            file,
            100 * share,
            TOP,
        )
    return read


def recall(graph: Any, vectors: npt.NDArray[np.float32]) -> float:
    """Share of the `TOP` closest rows that a graph finds, for some vectors of its own, evenly drawn."""
    some = vectors[:: max(1, len(vectors) // 64)]
    some = some[~np.isnan(some[:, 0])]
    _, want = exact(torch.from_numpy(vectors), torch.from_numpy(some), TOP)
    found = graph.search(some, TOP)[1]
    shared = sum(len((set(a) & set(b)) - {-1}) for a, b in zip(want.tolist(), found.tolist(), strict=True))
    return shared / max(1, int((want >= 0).sum()))
