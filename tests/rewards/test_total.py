# SPDX-License-Identifier: Apache-2.0
"""Unknown terms are left out of the total, and never scored as a miss."""

import itertools
import math

import pytest
import torch

from embedrl_verl.rewards import fill_with_group_mean, total_reward

NAN = math.nan


@pytest.mark.parametrize("weights", [(0.05, 0.8, 0.2), (0.05, 0.0, 0.8), (0.0, 0.0, 1.0)])
def test_equal_to_the_loop_for_every_pattern_of_unknowns(plain_total, weights):
    values = [(1.0, 0.0, NAN), (1.0, 0.0, NAN), (0.37, -0.6, NAN)]
    terms = torch.tensor(list(itertools.product(*values))).T
    alpha, beta, gamma = weights
    got = total_reward(*terms, alpha=alpha, beta=beta, gamma=gamma)
    wanted = plain_total(*terms, alpha=alpha, beta=beta, gamma=gamma)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-7, equal_nan=True)
    assert got.isnan().any() and not got.isnan().all()


def test_the_weights_of_the_paper_are_the_default():
    one, nothing = torch.ones(1), torch.zeros(1)
    assert total_reward(one, nothing, nothing).item() == pytest.approx(0.05)
    assert total_reward(nothing, one, nothing).item() == pytest.approx(0.8)
    assert total_reward(nothing, nothing, one).item() == pytest.approx(0.2)


def test_a_term_without_weight_makes_no_row_known():
    unknown = torch.tensor([NAN])
    assert total_reward(unknown, torch.ones(1), unknown, beta=0.0).isnan().all()
    assert total_reward(unknown, unknown, unknown).isnan().all()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"one shape; got \(2,\), \(1,\), \(1,\)"):
        total_reward(torch.zeros(2), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="beta must be at least 0 and finite; got -1"):
        total_reward(torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=-1)


def test_an_unknown_term_gets_the_mean_of_its_group_and_moves_no_advantage():
    term = torch.tensor([1.0, 0.0, NAN, 1.0, NAN, NAN])
    group = torch.tensor([5, 5, 5, 2, 2, 9])
    filled = fill_with_group_mean(term, group)
    assert filled[:5].tolist() == [1.0, 0.0, 0.5, 1.0, 1.0]
    assert filled[5].isnan()
    assert fill_with_group_mean(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_filling_does_not_depend_on_the_order_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(6).repeat_interleave(8)
    term = torch.rand(48, generator=generator)
    term[torch.rand(48, generator=generator) < 0.3] = NAN
    filled = fill_with_group_mean(term, group)
    for _ in range(50):
        order = torch.randperm(48, generator=generator)
        assert fill_with_group_mean(term[order], group[order]).equal(filled[order])
