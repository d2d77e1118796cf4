# SPDX-License-Identifier: Apache-2.0
"""Unknown terms are left out of the total, and never scored as a miss."""

import itertools
import math

import pytest
import torch

from embedrl_verl.rewards import partly_known, total_reward
from tests.rewards import plain

NAN = math.nan


@pytest.mark.parametrize("weights", [(0.05, 0.8, 0.2), (0.05, 0.0, 0.8), (0.0, 0.0, 1.0)])
def test_equal_to_the_loop_for_every_pattern_of_unknowns(weights):
    values = [(1.0, 0.0, NAN), (1.0, 0.0, NAN), (0.37, -0.6, NAN)]
    terms = torch.tensor(list(itertools.product(*values))).T
    alpha, beta, gamma = weights
    got = total_reward(*terms, alpha=alpha, beta=beta, gamma=gamma)
    wanted = plain.total(*terms, alpha=alpha, beta=beta, gamma=gamma)
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
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0; got -1"):
        total_reward(torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=-1)


def test_a_term_is_partly_known_where_only_others_of_the_group_have_it():
    term = torch.tensor([1.0, 0.0, NAN, 1.0, NAN, NAN, NAN])
    group = torch.tensor([5, 5, 5, 2, 2, 9, 9])
    assert partly_known(term, group).tolist() == [False, False, True, False, True, False, False]
    order = torch.tensor([6, 3, 0, 5, 2, 4, 1])
    assert partly_known(term[order], group[order]).equal(partly_known(term, group)[order])
    assert partly_known(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
