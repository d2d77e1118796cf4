# SPDX-License-Identifier: Apache-2.0
"""InfoNCE: equal to the sum written out, blind to same-content negatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from embedrl_verl.embedder import info_nce
from embedrl_verl.errors import EmbedderError


def vectors(seed: int, rows: int = 6, dim: int = 8) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


def loop(query, target, content, temperature) -> float:
    total = 0.0
    for i in range(len(query)):
        allowed = [j for j in range(len(target)) if j == i or content[j] != content[i]]
        scores = [float(query[i] @ target[j]) / temperature for j in allowed]
        total += math.log(sum(map(math.exp, scores))) - float(query[i] @ target[i]) / temperature
    return total / len(query)


@pytest.mark.parametrize("content", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 1, 0], [7] * 6])
def test_it_equals_the_sum_written_out(content):
    query, target = vectors(1), vectors(2)
    expected = [loop(query, target, content, 0.1), loop(target, query, content, 0.1)]
    ids = torch.tensor(content)
    one_way = info_nce(query, target, temperature=0.1, target_content=ids, symmetric=False)
    assert float(one_way) == pytest.approx(expected[0], rel=1e-9)
    assert float(info_nce(query, target, temperature=0.1, target_content=ids)) == pytest.approx(
        sum(expected) / 2, rel=1e-9
    )
    if content == [7] * 6:
        assert float(one_way) == 0.0


def test_swapping_the_sides_changes_nothing_when_symmetric():
    query, target = vectors(1), vectors(2)
    assert float(info_nce(query, target)) == pytest.approx(float(info_nce(target, query)), rel=1e-12)


def test_a_row_of_the_same_content_gets_no_gradient_from_its_twin():
    query, target = vectors(1).requires_grad_(), vectors(2).requires_grad_()
    info_nce(query, target, target_content=torch.tensor([0, 0, 0, 0, 0, 0]), temperature=0.1).backward()
    assert query.grad.abs().max() < 1e-12 and target.grad.abs().max() < 1e-12
    query.grad = None
    info_nce(query, target, temperature=0.1).backward()
    assert query.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": vectors(2, rows=5)}, "same shape"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"target_content": torch.zeros(3)}, r"must be \(6,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(EmbedderError, match=message):
        info_nce(**{"query": vectors(1), "target": vectors(2), **arguments})
