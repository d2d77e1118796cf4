# SPDX-License-Identifier: Apache-2.0
"""Ranks the candidates of a task and gives the numbers that the benchmarks' score files have, query by query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedrl_verl.evaluation.benchmarks.task import Query
from embedrl_verl.evaluation.metrics import top_grades
from embedrl_verl.ranks import first_rank

KS = (1, 5, 10)
BLOCK = 256
"""Queries that are ranked at once."""


def score_queries(
    queries: Tensor, candidates: Tensor, asked: Sequence[Query], names: Sequence[str], metric: str, *, is_local: bool
) -> dict[str, Tensor]:
    """By name (Q,) float64: the numbers of `metrics_at`, "rank" of the first relevant candidate (0: not retrieved), and
    "optimistic", the metric if ties counted for the model.

    Args:
        queries, candidates: (Q, D) and (C, D) float32 of length 1; a row of NaN has no vector.
        asked: the Q queries; a local one is ranked against its own candidates.
        names: of the C candidates.
    """
    # Equal vectors must have equal scores, and a product's last bit depends on the row's place.
    distinct, place = torch.unique(candidates, dim=0, return_inverse=True)
    everything = {name: column for column, name in enumerate(names)}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        similarity = (queries[start : start + BLOCK] @ distinct.T)[:, place]
        if is_local:
            width = max(1, *(len(query.candidates or ()) for query in block))
            scores, grades = torch.full((len(block), width), torch.nan), torch.zeros(len(block), width)
        else:
            scores, grades = similarity, torch.zeros_like(similarity)
        for row, query in enumerate(block):
            columns = everything
            if is_local:
                own = query.candidates or ()
                columns = {name: column for column, name in enumerate(own)}
                scores[row, : len(own)] = similarity[row, [everything[name] for name in own]]
            for name, grade in query.grades.items():
                grades[row, columns[name]] = grade
        parts.append(_block(scores, grades, metric))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _block(scores: Tensor, grades: Tensor, metric: str) -> dict[str, Tensor]:
    found = metrics_at(scores, grades) | {"rank": first_rank(scores, grades).double()}
    above_ties = torch.where(grades > 0, scores.nextafter(torch.tensor(torch.inf)), scores)
    return found | {"optimistic": metrics_at(above_ties, grades)[metric]}


def metrics_at(scores: Tensor, grades: Tensor) -> dict[str, Tensor]:
    """The 24 numbers of VLM2Vec's score files by name, (Q,) float64 each: hit, ndcg_linear, ndcg_exponential,
    precision, recall, f1, map (AP over min(relevant, k)) and mrr, each @1, @5 and @10.

    Arguments and errors as in `hit_at_k`: ties count against the model, and NaN is not retrieved.
    """
    found: dict[str, Tensor] = {}
    top = top_grades(scores, grades, max(KS))
    ideal = grades.double().topk(top.shape[1], dim=1).values
    rank = torch.arange(1, top.shape[1] + 1, dtype=torch.float64)
    relevant = (grades > 0).sum(dim=1).double()
    some = relevant.clamp(min=1)
    for k in KS:
        is_hit = (top[:, :k] > 0).double()
        hits, place = is_hit.sum(dim=1), rank[:k]
        precision, recall = hits / k, hits / some
        values = {
            "hit": (hits > 0).double(),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall).masked_fill(hits == 0, 1.0),
            "mrr": (is_hit / place).amax(dim=1),
            "map": (is_hit * is_hit.cumsum(dim=1) / place).sum(dim=1) / some.clamp(max=k),
            "ndcg_linear": _gained(top[:, :k], ideal[:, :k]),
            "ndcg_exponential": _gained(top[:, :k].exp2() - 1, ideal[:, :k].exp2() - 1),
        }
        found |= {f"{name}@{k}": value for name, value in values.items()}
    return found


def _gained(gains: Tensor, best: Tensor) -> Tensor:
    discount = torch.arange(2, gains.shape[1] + 2, dtype=torch.float64).log2()
    most = (best / discount).sum(dim=1)
    return (gains / discount).sum(dim=1) / most.masked_fill(most == 0, 1.0)
