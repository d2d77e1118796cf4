# SPDX-License-Identifier: Apache-2.0
"""Sums and matrix products that do not depend on order, and the one assumption they rest on."""

import pytest
import torch

from embedrl_verl.rewards.exact import similarity_matrix, snap_, snap_components


def _unit(rows, dim, seed=0):
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("count", [1, 7, 4096, 100_000])
def test_snapped_terms_sum_to_the_same_bits_in_any_order(count):
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(count, generator=generator, dtype=torch.float64) * 1.37 - 0.37
    snapped = snap_(terms.clone(), count)
    assert float((snapped - terms).abs().max()) <= 2.0 ** (count.bit_length() - 53)
    orders = [torch.randperm(count, generator=generator) for _ in range(20)]
    assert {float(snapped[order].sum()) for order in orders} == {float(sum(snapped.tolist()))}
    if count > 1000:
        assert len({float(terms[order].sum()) for order in orders}) > 1  # not vacuous


def test_exp_of_a_value_does_not_depend_on_where_it_stands():
    """The outcome reward needs it: vectorised body, tail, other offsets and threads must agree."""
    values = torch.rand(200_003, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * -41
    expected = values.exp()
    for offset in range(1, 20):
        assert values[offset:].exp().equal(expected[offset:])
        short = values[offset : 2 * offset]
        assert short.exp().equal(expected[offset : 2 * offset])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    assert values[order].exp().equal(expected[order])


def test_products_of_snapped_vectors_are_exact():
    query, target = _unit(40, 500), _unit(30, 500, seed=1)
    scale = 2**26
    integers = [[[round(c * scale) for c in row] for row in snap_components(m).tolist()] for m in (query, target)]
    exact = [[sum(a * b for a, b in zip(q, t, strict=True)) / scale**2 for t in integers[1]] for q in integers[0]]
    assert (snap_components(query) @ snap_components(target).T).tolist() == exact
    plain = query.double() @ target.double().T
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert not plain.equal(query[:, order].double() @ target[:, order].double().T)  # not vacuous


@pytest.mark.parametrize("dim", [1, 3, 64, 1000])
def test_similarity_is_as_good_as_float32(dim):
    query, target = _unit(300, dim), _unit(200, dim, seed=1)
    exact = query.double() @ target.double().T
    assert float((similarity_matrix(query, target) - exact).abs().max()) < 1e-7


def test_similarity_has_the_same_bits_for_any_order_and_any_side():
    query, target = _unit(137, 77), _unit(61, 77, seed=1)
    similarity = similarity_matrix(query, target)
    assert similarity_matrix(target, query).T.equal(similarity)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, cols, dims = (torch.randperm(n, generator=generator) for n in (137, 61, 77))
        got = similarity_matrix(query[rows][:, dims], target[cols][:, dims])
        assert got.equal(similarity[rows][:, cols])


def test_equal_vectors_have_equal_similarities():
    """Two rollouts with the same T-CoT tie exactly, so that the tie rule applies to them."""
    query, target = _unit(50, 333), _unit(3, 333, seed=1).repeat(40, 1)
    similarity = similarity_matrix(query, target)
    assert similarity[:, :3].repeat(1, 40).equal(similarity)
