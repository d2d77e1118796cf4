# SPDX-License-Identifier: Apache-2.0
"""Hit@k, recall@k, NDCG@k and MRR@k, with ties broken against the model.

Among equal scores the lowest grade ranks first, so a collapsed model (all scores equal) gets no credit.
A candidate whose score is NaN is not retrieved: it is not in the ranking, and if relevant it still counts in the
recall's and the ideal's denominator. So NaN also marks what is no candidate of a query (local candidate lists).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

Gain = Literal["linear", "exponential"]
# Queries are ranked in blocks of this many cells, so that memory beside the scores stays constant.
_BLOCK_CELLS = 2**22


@overload
def hit_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[False] = False) -> float: ...
@overload
def hit_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[True]) -> Tensor: ...
def hit_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: bool = False) -> float | Tensor:
    """Share of the queries with a relevant candidate among the first k; a query without any relevant one is a miss.

    Args (of all metrics here):
        scores: (Q, C) float, higher is better, NaN = not retrieved.
        relevant: (Q, C) bool, or grades of at least 0 (int or float; above 0 = relevant).
        k: cut-off, at least 1; it may exceed C.
        per_query: return (Q,) float64 instead of the mean over queries.

    Raises:
        ValueError: shapes differ, there is no query, k < 1, or a grade is negative or not finite.
    """
    grades = top_grades(scores, relevant, k)
    return _result((grades > 0).any(dim=1).double(), per_query)


@overload
def recall_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[False] = False) -> float: ...
@overload
def recall_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[True]) -> Tensor: ...
def recall_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: bool = False) -> float | Tensor:
    """Share of the relevant candidates among the first k; 0 for a query without any. Arguments as in `hit_at_k`."""
    grades = top_grades(scores, relevant, k)
    found, there = (grades > 0).sum(dim=1).double(), (relevant > 0).sum(dim=1)
    return _result(found / there.clamp(min=1), per_query)


@overload
def mrr_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[False] = False) -> float: ...
@overload
def mrr_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: Literal[True]) -> Tensor: ...
def mrr_at_k(scores: Tensor, relevant: Tensor, k: int, *, per_query: bool = False) -> float | Tensor:
    """1 / rank of the first relevant candidate, 0 beyond rank k. Arguments as in `hit_at_k`."""
    grades = top_grades(scores, relevant, k)
    rank = torch.arange(1, grades.shape[1] + 1, device=grades.device, dtype=torch.float64)
    return _result(((grades > 0) / rank).amax(dim=1), per_query)


@overload
def ndcg_at_k(
    scores: Tensor, relevant: Tensor, k: int, gain: Gain = "linear", *, per_query: Literal[False] = False
) -> float: ...
@overload
def ndcg_at_k(
    scores: Tensor, relevant: Tensor, k: int, gain: Gain = "linear", *, per_query: Literal[True]
) -> Tensor: ...
def ndcg_at_k(
    scores: Tensor, relevant: Tensor, k: int, gain: Gain = "linear", *, per_query: bool = False
) -> float | Tensor:
    """DCG@k over the DCG@k of the grades in falling order; 0 where that is 0. Arguments as in `hit_at_k`, and

    gain: "linear" = the grade (MMEB-V2, mteb, UVRB), "exponential" = 2**grade - 1.
    """
    if gain not in ("linear", "exponential"):
        raise ValueError(f"gain must be linear or exponential; got {gain!r}")
    grades = top_grades(scores, relevant, k)
    ideal = torch.cat([relevant[block].double().topk(grades.shape[1], dim=1).values for block in _blocks(relevant)])
    if gain == "exponential":
        grades, ideal = torch.exp2(grades) - 1, torch.exp2(ideal) - 1
    discount = torch.arange(2, grades.shape[1] + 2, device=grades.device, dtype=torch.float64).log2()
    best = (ideal / discount).sum(dim=1)
    return _result((grades / discount).sum(dim=1) / best.masked_fill(best == 0, 1.0), per_query)


def _result(values: Tensor, per_query: bool) -> float | Tensor:
    return values if per_query else float(values.mean())


@torch.no_grad()
def top_grades(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """(Q, min(k, C)) float64: grades of the first k candidates in the ranking that is worst for the model; arguments as
    in `hit_at_k`."""
    if scores.dim() != 2 or scores.shape != relevant.shape or 0 in scores.shape:
        raise ValueError(
            "scores and relevant must both be (queries, candidates) with at least one of each; got "
            f"{tuple(scores.shape)} and {tuple(relevant.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if not ((relevant >= 0) & (relevant < torch.inf)).all():
        raise ValueError("grades in relevant must be finite and at least 0 (0 = not relevant)")
    return torch.cat([_rank_block(scores[block], relevant[block].double(), k) for block in _blocks(scores)])


def _blocks(matrix: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_CELLS // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def _rank_block(scores: Tensor, grades: Tensor, k: int) -> Tensor:
    """The first k grades of each row: by falling score, and among equal scores the lowest grade first."""
    missing = scores.isnan()
    scores, grades = scores.masked_fill(missing, -torch.inf), grades.masked_fill(missing, 0.0)
    by_grade = grades.argsort(dim=1)
    by_score = scores.gather(1, by_grade).argsort(dim=1, descending=True, stable=True)[:, :k]
    return grades.gather(1, by_grade.gather(1, by_score))
