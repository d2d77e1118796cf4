# SPDX-License-Identifier: Apache-2.0
"""Retrieval metrics: hand-computed vectors, ties against the model, NaN as not retrieved."""

import math

import pytest
import torch

from embedrl_verl.evaluation import metrics
from embedrl_verl.evaluation.metrics import hit_at_k, mrr_at_k, ndcg_at_k, recall_at_k

NAN = math.nan
A = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.8, 0.7, 0.1, 0.0], [0.2, 0.4, 0.3, 0.5], [0.1, 0.2, 0.3, 0.05]])
B = torch.tensor([[0.5, 0.9, 0.4, 0.8, 0.1, 0.2]])


def _approx(value):
    return pytest.approx(value, abs=1e-6)


def _ranking(grades):
    """Scores that rank the candidates in the order of their grades, and the grades."""
    return torch.arange(len(grades), 0, -1.0)[None], torch.tensor([grades], dtype=torch.float32)


@pytest.mark.parametrize(
    ("k", "hit", "mrr", "ndcg"),
    [(1, 0.25, 0.25, 0.25), (2, 0.5, 0.375, 0.407732), (3, 0.75, 0.458333, 0.532732), (4, 1.0, 0.520833, 0.640402)],
)
def test_single_positives(k, hit, mrr, ndcg):
    relevant = torch.eye(4, dtype=torch.bool)
    assert hit_at_k(A, relevant, k) == _approx(hit)
    assert recall_at_k(A, relevant, k) == _approx(hit)
    assert mrr_at_k(A, relevant, k) == _approx(mrr)
    assert ndcg_at_k(A, relevant, k) == _approx(ndcg)
    assert ndcg_at_k(A, relevant, k, "exponential") == _approx(ndcg)


@pytest.mark.parametrize(
    ("k", "hit", "recall", "mrr", "ndcg"),
    [(1, 0, 0, 0, 0), (2, 1, 1 / 3, 0.5, 0.386853), (3, 1, 2 / 3, 0.5, 0.530721), (5, 1, 1, 0.5, 0.712263)],
)
def test_several_positives(k, hit, recall, mrr, ndcg):
    relevant = torch.tensor([[1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    assert hit_at_k(B, relevant, k) == _approx(hit)
    assert recall_at_k(B, relevant, k) == _approx(recall)
    assert mrr_at_k(B, relevant, k) == _approx(mrr)
    assert ndcg_at_k(B, relevant, k) == _approx(ndcg)


@pytest.mark.parametrize(
    ("grades", "k", "linear", "exponential"),
    [
        ([3, 2, 0, 1, 0, 0], 1, 2 / 3, 3 / 7),
        ([3, 2, 0, 1, 0, 0], 2, 0.617320, 0.408300),
        ([3, 2, 0, 1, 0, 0], 3, 0.867503, 0.759192),
        ([3, 2, 0, 1, 0, 0], 5, 0.867503, 0.759192),
        ([3, 1, 2, 0, 0, 0], 1, 0.333333, 0.142857),
        ([3, 1, 2, 0, 0, 0], 3, 0.525005, 0.479091),
        ([3, 1, 2, 0, 0, 0], 5, 0.705891, 0.616646),
    ],
)
def test_graded_relevance_vector_c(grades, k, linear, exponential):
    relevant = torch.tensor([grades])
    assert ndcg_at_k(B, relevant, k) == _approx(linear)
    assert ndcg_at_k(B, relevant, k, gain="exponential") == _approx(exponential)


@pytest.mark.parametrize(
    ("k", "linear", "exponential"),
    [(1, 0.666667, 0.428571), (3, 0.739812, 0.713621), (5, 0.801495, 0.768299), (10, 0.904790, 0.851491)],
)
def test_graded_relevance_vector_c_prime(k, linear, exponential):
    scores, grades = _ranking([2, 3, 0, 2, 2, 2])
    assert ndcg_at_k(scores, grades, k) == _approx(linear)
    assert ndcg_at_k(scores, grades, k, "exponential") == _approx(exponential)
    assert recall_at_k(scores, grades, 5) == _approx(0.8)


def test_graded_relevance_vector_c_second():
    scores, grades = _ranking([2, 3, 2, 0, 2, *[2] * 16])
    assert ndcg_at_k(scores, grades, 5) == _approx(0.821598)
    assert ndcg_at_k(scores, grades, 5, "exponential") == _approx(0.784490)
    assert (hit_at_k(scores, grades, 5), recall_at_k(scores, grades, 5)) == (1.0, _approx(0.2))


def test_more_positives_than_places_vector_d():
    scores, relevant = _ranking([0, 1, 0, 1, 1, 0, 1, 1, 1, 1])
    assert hit_at_k(scores, relevant, 5) == 1.0
    assert recall_at_k(scores, relevant, 5) == _approx(0.428571)
    assert ndcg_at_k(scores, relevant, 5) == _approx(0.491260)
    assert ndcg_at_k(scores, relevant, 10) == _approx(0.738690)


def test_from_embeddings_vector_e():
    queries = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    documents = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
    scores, relevant = queries @ documents.T, torch.eye(3, dtype=torch.bool)
    assert hit_at_k(scores, relevant, 1) == 0
    assert hit_at_k(scores, relevant, 2) == _approx(0.666667)
    assert mrr_at_k(scores, relevant, 3) == _approx(0.444444)
    assert ndcg_at_k(scores, relevant, 3) == _approx(0.587287)


@pytest.mark.parametrize("positive", [0, 1])
def test_a_tie_is_a_miss_wherever_the_positive_stands_vector_t(positive):
    relevant = torch.zeros(1, 3)
    relevant[0, positive] = 1
    scores = torch.tensor([[0.5, 0.5, 0.3]])
    assert (hit_at_k(scores, relevant, 1), hit_at_k(scores, relevant, 2)) == (0.0, 1.0)
    assert mrr_at_k(scores, relevant, 3) == 0.5


def test_a_collapsed_model_retrieves_nothing():
    scores, relevant = torch.full((5, 7), 0.3), torch.zeros(5, 7)
    relevant[:, 0] = 1
    assert hit_at_k(scores, relevant, 6) == 0.0
    assert mrr_at_k(scores, relevant, 7) == _approx(1 / 7)


def test_nan_is_not_retrieved_and_is_no_competitor():
    relevant = torch.tensor([[True, False, False]] * 3)
    scores = torch.tensor([[NAN, 0.1, 0.2], [0.5, NAN, 0.4], [NAN, NAN, NAN]])
    for metric in (hit_at_k, recall_at_k, mrr_at_k, ndcg_at_k):
        assert metric(scores, relevant, 3, per_query=True).tolist() == [0.0, 1.0, 0.0]


def test_local_candidates_are_the_ones_that_are_not_nan():
    relevant = torch.tensor([[True, False, False]])
    assert hit_at_k(torch.tensor([[0.5, 0.4, NAN]]), relevant, 1) == 1.0
    assert hit_at_k(torch.tensor([[0.5, 0.4, 0.9]]), relevant, 1) == 0.0


def test_a_query_without_a_relevant_candidate_counts_zero():
    for metric in (hit_at_k, recall_at_k, mrr_at_k, ndcg_at_k):
        assert metric(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), 2) == 0.0


def _plain(scores, grades, k):
    """Gains of the first k, by sorting Python tuples: best score first, worst grade first among equals, NaN nowhere."""
    kept = [(s, g) for s, g in zip(scores, grades, strict=True) if not math.isnan(s)]
    ranked = [g for _, g in sorted(kept, key=lambda pair: (-pair[0], pair[1]))][:k]
    total = sum(g > 0 for g in grades)
    first = next((i for i, g in enumerate(ranked) if g), None)
    discounts = [math.log2(i + 2) for i in range(k)]
    best = sum(g / d for g, d in zip(sorted(grades, reverse=True), discounts, strict=False))
    return {
        hit_at_k: float(any(ranked)),
        recall_at_k: sum(g > 0 for g in ranked) / total if total else 0.0,
        mrr_at_k: 0.0 if first is None else 1 / (first + 1),
        ndcg_at_k: sum(g / d for g, d in zip(ranked, discounts, strict=False)) / best if best else 0.0,
    }


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_equal_to_sorting_tuples_with_ties_grades_and_nan(k, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_CELLS", 50)  # several blocks
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 5, (60, 12), generator=generator).float()
    scores[torch.rand(60, 12, generator=generator) < 0.2] = NAN
    grades = torch.randint(0, 4, (60, 12), generator=generator) * (torch.rand(60, 12, generator=generator) < 0.4)
    wanted = [_plain(s, g, k) for s, g in zip(scores.tolist(), grades.tolist(), strict=True)]
    for metric in (hit_at_k, recall_at_k, mrr_at_k, ndcg_at_k):
        got = metric(scores, grades, k, per_query=True)
        assert got.tolist() == pytest.approx([row[metric] for row in wanted], abs=1e-12)
        assert metric(scores, grades, k) == pytest.approx(float(got.mean()))


@pytest.mark.parametrize(
    ("scores", "relevant", "k", "message"),
    [
        (torch.rand(2, 3), torch.zeros(2, 2), 1, r"got \(2, 3\) and \(2, 2\)"),
        (torch.rand(0, 3), torch.zeros(0, 3), 1, "at least one of each"),
        (torch.rand(2, 3), torch.zeros(2, 3), 0, "k must be at least 1; got 0"),
        (torch.rand(2, 3), torch.full((2, 3), -1), 1, "at least 0"),
        (torch.rand(2, 3), torch.full((2, 3), NAN), 1, "finite"),
    ],
)
def test_wrong_input_is_refused(scores, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        hit_at_k(scores, relevant, k)


def test_an_unknown_gain_is_refused():
    with pytest.raises(ValueError, match="linear or exponential; got 'log'"):
        ndcg_at_k(A, torch.eye(4), 1, "log")
