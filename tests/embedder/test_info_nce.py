# SPDX-License-Identifier: Apache-2.0
"""InfoNCE: equal to the sum written out, blind to same-content negatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from embedrl_verl.data.identity import NO_QUERY
from embedrl_verl.embedder import info_nce
from embedrl_verl.embedder.info_nce import ContrastiveLayout, contrastive_loss
from embedrl_verl.errors import EmbedderError


def vectors(seed: int, rows: int = 6, dim: int = 8) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


def layout(query_pair, target_pair, query_content=None, target_content=None) -> ContrastiveLayout:
    content = {"q": query_content or query_pair, "t": target_content or target_pair}
    return ContrastiveLayout(
        *(torch.tensor(list(ids)) for ids in (query_pair, target_pair, content["q"], content["t"]))
    )


def written_out(query, target, given: ContrastiveLayout, temperature: float) -> float:
    """One direction, row by row: mean over partners of -log softmax of the partner among itself and the negatives."""
    rows = []
    for i in range(len(query)):
        score = [float(query[i] @ t) / temperature for t in target]
        partners = [j for j in range(len(target)) if given.target_pair[j] == given.query_pair[i]]
        negatives = [
            j
            for j in range(len(target))
            if j not in partners and (given.target_content[j] != given.query_content[i]).all()
        ]
        if partners:
            own = [
                math.log(math.exp(score[j]) + sum(math.exp(score[n]) for n in negatives)) - score[j] for j in partners
            ]
            rows.append(sum(own) / len(own))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("content", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 1, 0], [7] * 6])
def test_it_equals_the_sum_written_out(content):
    query, target = vectors(1), vectors(2)
    given = layout(range(6), range(6), content, content)
    expected = [written_out(query, target, given, 0.1), written_out(target, query, given, 0.1)]
    ids = torch.tensor(content)
    one_way = info_nce(query, target, temperature=0.1, target_content=ids, symmetric=False)
    assert float(one_way) == pytest.approx(expected[0], rel=1e-9)
    assert float(info_nce(query, target, temperature=0.1, target_content=ids)) == pytest.approx(
        sum(expected) / 2, rel=1e-9
    )
    if content == [7] * 6:
        assert float(one_way) == 0.0
        leaves = [query.requires_grad_(), target.requires_grad_()]
        gradients = torch.autograd.grad(info_nce(*leaves, temperature=0.1, target_content=ids), leaves)
        assert all(one.abs().max() < 1e-12 for one in gradients)


def test_several_rollouts_of_a_pair_are_partners_and_never_negatives_of_each_other():
    query, target = vectors(1, 6), vectors(2, 5)
    given = layout([0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 2])
    flipped = layout([0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 2])
    expected = (written_out(query, target, given, 0.1) + written_out(target, query, flipped, 0.1)) / 2
    assert float(contrastive_loss(query, target, given, temperature=0.1).loss) == pytest.approx(expected, rel=1e-9)


def test_hard_negatives_are_columns_of_every_query_and_no_rows_of_their_own():
    query, target = vectors(1, 3), vectors(2, 5)
    given = layout([0, 1, 2], [0, 1, 2, -1, -1], [10, 11, 12], [10, 11, 12, 99, 11])
    one_way = written_out(query, target, given, 0.1)  # the last column has query 1's content and is masked there
    back = written_out(target[:3], query, layout([0, 1, 2], [0, 1, 2], [10, 11, 12], [10, 11, 12]), 0.1)
    contrast = contrastive_loss(query, target, given, temperature=0.1)
    assert float(contrast.loss) == pytest.approx((one_way + back) / 2, rel=1e-9)
    assert contrast.masked == 1 and contrast.negatives == pytest.approx((4 + 3 + 4) / 3)


def test_a_row_whose_partner_is_missing_is_a_negative_and_does_not_count_itself():
    query, target = vectors(1, 3), vectors(2, 2)
    given = layout([0, 1, 2], [0, 1])
    assert float(contrastive_loss(query, target, given, temperature=0.1, symmetric=False).loss) == pytest.approx(
        written_out(query, target, given, 0.1), rel=1e-9
    )


def test_matryoshka_averages_the_losses_of_the_cut_vectors():
    query, target = vectors(1), vectors(2)
    given = layout(list(range(6)), list(range(6)))

    def cut(dim: int) -> float:
        parts = F.normalize(query[:, :dim], dim=1), F.normalize(target[:, :dim], dim=1)
        return float(contrastive_loss(*parts, given, temperature=0.1).loss)

    found = float(contrastive_loss(query, target, given, temperature=0.1, matryoshka_dims=(2, 4)).loss)
    assert found == pytest.approx((cut(2) + cut(4) + cut(8)) / 3, rel=1e-9)


# Contents (query, target) of pairs: captions of one photo; a photo with a caption that another photo has too; both.
SAME_QUERY = [[1, 10], [1, 20], [2, 30], [3, 40]]
CHAIN = [[1, 10], [1, 20], [2, 20], [3, 40]]
CROSSED = [[1, 10], [1, 20], [2, 10], [2, 20]]


@pytest.mark.parametrize("contents", [SAME_QUERY, CHAIN, CROSSED])
def test_pairs_of_an_equal_query_are_no_negatives_in_either_direction(contents):
    query, target = vectors(1, 4), vectors(2, 4)
    given = layout(range(4), range(4), contents, contents)
    expected = (written_out(query, target, given, 0.1) + written_out(target, query, given, 0.1)) / 2
    assert float(contrastive_loss(query, target, given, temperature=0.1).loss) == pytest.approx(expected, rel=1e-9)
    columns = torch.tensor(contents).T
    ids = {"query_content": columns[0], "target_content": columns[1]}
    assert float(info_nce(query, target, temperature=0.1, **ids)) == pytest.approx(expected, rel=1e-9)
    assert float(info_nce(query, target, temperature=0.1, target_content=columns[1])) != pytest.approx(expected)


@pytest.mark.parametrize("rollouts", [1, 2])
def test_perfect_vectors_of_one_photo_with_two_captions_have_no_loss(rollouts):
    pair = torch.arange(3).repeat_interleave(rollouts)
    perfect, contents = torch.eye(8)[[0, 0, 1]][pair], torch.tensor(SAME_QUERY)[:3][pair]
    contrast = contrastive_loss(perfect, perfect, ContrastiveLayout(pair, pair, contents, contents))
    assert float(contrast.loss) < 1e-3 and contrast.hit1 == 1.0
    assert contrast.masked == 2 * rollouts**2


def test_pairs_of_an_equal_query_get_no_gradient_from_each_other():
    given = layout(range(4), range(4), CHAIN, CHAIN)

    def gradient(row: int, of: str) -> torch.Tensor:
        """Of one row's loss alone, in all vectors of the other side."""
        query, target = vectors(1, 4).requires_grad_(), vectors(2, 4).requires_grad_()
        only = torch.arange(4) == row
        every = torch.ones(4, dtype=torch.bool)
        if of == "query":
            contrastive_loss(
                query[only], target, given.select(only, every), temperature=0.1, symmetric=False
            ).loss.backward()
            return target.grad
        contrastive_loss(
            target[only], query, given.select(only, every), temperature=0.1, symmetric=False
        ).loss.backward()
        return query.grad

    for of in ("query", "target"):
        moved = [gradient(row, of).abs().sum(dim=1).gt(0).tolist() for row in range(4)]
        assert moved == [
            [True, False, True, True],
            [False, True, False, True],
            [True, False, True, True],
            [True, True, True, True],
        ]


def test_a_hard_negative_that_is_a_caption_of_the_same_photo_is_none_of_that_photo():
    contents = [[1, 10], [1, 20], [2, 30]]
    mined = [[NO_QUERY, 20], [NO_QUERY, 99]]  # pair 1's caption, mined for pair 0; and a wrong one
    given = layout([0, 1, 2], [0, 1, 2, -1, -1], contents, contents + mined)
    assert given.negatives().tolist() == [
        [False, False, True, False, True],
        [False, False, True, False, True],
        [True, True, False, True, True],
    ]


def test_a_query_without_negatives_is_no_hit():
    vectors = torch.eye(4)[[0, 0, 1]]
    pair = torch.arange(3)
    content = torch.tensor([[7, 0], [7, 1], [8, 2]])  # the first two are of one query
    assert contrastive_loss(vectors, vectors, ContrastiveLayout(pair, pair, content, content)).hit1 == 1.0
    first = ContrastiveLayout(pair[:2], pair[:2], content[:2], content[:2])
    assert math.isnan(contrastive_loss(vectors[:2], vectors[:2], first).hit1)


def test_hit1_counts_ties_against_the_model():
    query, target = torch.eye(3), torch.eye(3)
    given = layout([0, 1, 2], [0, 1, 2])
    assert contrastive_loss(query, target, given).hit1 == 1.0
    target[1] = target[0]
    assert contrastive_loss(query, target, given).hit1 == pytest.approx(1 / 3)


TWO = layout([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: info_nce(vectors(1), vectors(2, rows=5)), "same shape"),
        (lambda: info_nce(vectors(1), vectors(2), temperature=0.0), "temperature must be positive; got 0.0"),
        (lambda: info_nce(vectors(1), vectors(2), target_content=torch.zeros(3)), r"target_content must be \(6,\)"),
        (
            lambda: info_nce(vectors(1), vectors(2), query_content=torch.zeros(6, 2)),
            r"query_content must be \(6,\); got \(6, 2\)",
        ),
        (lambda: layout([0, -1], [0, 1]), "query_pair must be 0 or more; got -1"),
        (lambda: layout([0, 1], [0, 1], [0, 1, 2]), "query_pair and query_content must be int64 of one length"),
        (lambda: layout([0, 1], [0, 1], [[0, 0], [1, 1]], [0, 1]), "target_content must be int64 of one length"),
        (lambda: contrastive_loss(vectors(1, 2), vectors(2, 2), layout([0, 1], [2, 3])), "no query has a partner"),
        (lambda: contrastive_loss(vectors(1, 3), vectors(2, 2), TWO), r"must be \(2, D\) and \(2, D\)"),
        (
            lambda: contrastive_loss(vectors(1, 2), vectors(2, 2), TWO, matryoshka_dims=(9,)),
            r"matryoshka_dims must lie in 1..8; got \[9\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(build, message):
    with pytest.raises(EmbedderError, match=message):
        build()
