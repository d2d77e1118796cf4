# SPDX-License-Identifier: Apache-2.0
"""Retrieval metrics of one validation pass: every query against every target of its data source.

verl validates in batches and averages per-row numbers; retrieval is a property of the whole set. The reward stage adds
its rows here, and after verl's own pass the trainer asks for Hit@1 and NDCG@k. The targets of all pairs with an equal
query or an equal target are relevant. A row without a vector (its rollout or its embedding has failed) counts as not
retrieved, and such rows are reported beside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import torch

from embedrl_verl.data.identity import shares_content
from embedrl_verl.evaluation.metrics import hit_at_k, ndcg_at_k


@dataclass(frozen=True)
class ValidationRow:
    """One embedded item.

    Attributes:
        source: data source.
        side: 0 query, 1 target.
        session: the rollout of the prompt, from 0.
        content: ids of the pair's contents (`ContentId`), as many for all rows.
        embedding: (D,) float; failed if None or not finite.
        pair: names the prompt, with the side, among those of its source.
    """

    source: str
    side: int
    session: int
    content: tuple[int, ...]
    embedding: torch.Tensor | None
    pair: str = ""

    @property
    def vector(self) -> torch.Tensor | None:
        """The embedding; None if the row has failed."""
        return self.embedding if self.embedding is not None and self.embedding.isfinite().all() else None


class RetrievalValidation:
    """Collects the rows of a validation pass and scores them."""

    def __init__(self, ndcg_k: int) -> None:
        self._ndcg_k = ndcg_k
        self._rows: list[ValidationRow] = []

    def add(self, rows: list[ValidationRow]) -> None:
        """Add the rows of one validation batch."""
        self._rows.extend(rows)

    def metrics(self, expected: Iterable[ValidationRow] = ()) -> dict[str, float]:
        """Scores of everything added, and forget it.

        Args:
            expected: the rows that a complete pass has; those of them that were not added count as failed.

        Returns:
            `val-core/<source>/hit@1` and `.../ndcg@k` in [0, 1] for every data source (as `metric_name` has it), the
            plain mean over sources under `val-core/all/...`, and `val-aux/<source>/failed_rows`. With several rollouts
            a prompt the metrics are averaged over them. Empty when there are no rows.
        """
        known = {_identity(row) for row in self._rows}
        by_source: dict[str, list[ValidationRow]] = defaultdict(list)
        for row in [*self._rows, *(row for row in expected if _identity(row) not in known)]:
            by_source[metric_name(row.source)].append(row)
        self._rows = []
        result: dict[str, float] = {}
        of_sources: dict[str, list[float]] = defaultdict(list)
        for source, rows in sorted(by_source.items()):
            result[f"val-aux/{source}/failed_rows"] = float(sum(row.vector is None for row in rows))
            sessions = sorted({row.session for row in rows})
            scores = [self._score([row for row in rows if row.session == session]) for session in sessions]
            for name in scores[0]:
                mean = _mean([score[name] for score in scores])
                result[f"val-core/{source}/{name}"] = mean
                of_sources[name].append(mean)
        return result | {f"val-core/all/{name}": _mean(values) for name, values in of_sources.items()}

    def _score(self, rows: list[ValidationRow]) -> dict[str, float]:
        queries, targets = ([row for row in rows if row.side == side] for side in (0, 1))
        hit, ndcg = 0.0, 0.0
        if queries and targets:
            width = next((len(row.vector) for row in rows if row.vector is not None), 1)
            similarity = _vectors(queries, width) @ _vectors(targets, width).T
            contents = (torch.tensor([row.content for row in side], dtype=torch.int64) for side in (queries, targets))
            relevant = shares_content(*contents)
            hit, ndcg = hit_at_k(similarity, relevant, 1), ndcg_at_k(similarity, relevant, self._ndcg_k)
        return {"hit@1": hit, f"ndcg@{self._ndcg_k}": ndcg}


def _identity(row: ValidationRow) -> tuple[str, int, int, str]:
    return row.source, row.side, row.session, row.pair


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _vectors(rows: list[ValidationRow], width: int) -> torch.Tensor:
    """(rows, width) float32; a failed row is NaN, which the metrics count as not retrieved."""
    failed = torch.full((width,), float("nan"))
    return torch.stack([failed if row.vector is None else row.vector.float() for row in rows])


def roster(dataset: Any, sessions: int) -> list[ValidationRow]:
    """A row without vector for each rollout that a complete validation has."""
    return [
        ValidationRow(source, side, session, content, None, pair_id)
        for source, pair_id, content in zip(dataset.pair_sources, dataset.pair_ids, dataset.contents, strict=True)
        for side in (0, 1)
        for session in range(sessions)
    ]


def left_out_metrics(train: Any, validation: Any, *, by_source: bool) -> dict[str, float]:
    """Pairs that are too long, of both data sets and of each source that has some; nothing where all pairs fit.

    Args:
        train, validation: `TCoTDataset`s.
        by_source: False where verl puts the metrics of several steps together, which adds up whatever has "sum" or
            "total" in its name, as a source may.
    """
    found = {}
    for name, data in (("train", train), ("val", validation)):
        if data.left_out:
            found[f"data/left_out/{name}"] = float(sum(data.left_out.values()))
            found[f"data/pairs/{name}"] = float(len(data.pair_ids) + sum(data.left_out.values()))
        for source, count in data.left_out.items() if by_source else ():
            found[f"data/left_out/{name}/{metric_name(source)}"] = float(count)
    return found


def metric_name(source: str) -> str:
    """A data source as a part of a metric's name: `all` is the mean over sources, and a slash ends a part."""
    quoted = source.replace("%", "%25").replace("/", "%2F")
    return "%61ll" if quoted == "all" else quoted


def card_scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """The core scores of a validation under names for a model card: "hit@1 (birds)", "hit@1 (all, raw input)"."""
    scores = {}
    for name, value in metrics.items():
        kind, *rest = name.removeprefix("raw/").split("/")
        if kind == "val-core" and len(rest) == 2:
            source, metric = rest
            named = "'all'" if source != "all" and unquote(source) == "all" else unquote(source)
            scores[f"{metric} ({named}{', raw input' if name.startswith('raw/') else ''})"] = float(value)
    return scores
