# SPDX-License-Identifier: Apache-2.0
"""Intervals agree with tables and cover what they claim."""

import math

import pytest
import torch

from embedrl_verl.evaluation.stats import bootstrap_interval, mean_interval


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216), (31, 2.04227)])
def test_t_interval_agrees_with_the_table(count, t):
    values = [0.1 * i for i in range(count)]
    mean, low, high = mean_interval(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    assert mean == pytest.approx(sum(values) / count)
    assert (high - low) / 2 == pytest.approx(t * deviation / math.sqrt(count), rel=1e-4)
    assert mean - low == pytest.approx(high - mean)


def test_three_equal_seeds_have_an_interval_of_no_width():
    assert mean_interval([0.4, 0.4, 0.4]) == pytest.approx((0.4, 0.4, 0.4))


def test_bootstrap_is_repeatable_and_near_the_normal_interval():
    values = torch.rand(400, generator=torch.Generator().manual_seed(1))
    mean, low, high = bootstrap_interval([values.tolist()])
    assert bootstrap_interval([values.tolist()]) == (mean, low, high)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.08)
    assert low < mean < high


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [([0.5], 0.95, "at least two values; got 1"), ([0.5, math.nan], 0.95, "finite"), ([0.1, 0.2], 1.0, "got 1.0")],
)
def test_wrong_input_is_refused(values, confidence, message):
    for interval, given in ((mean_interval, values), (bootstrap_interval, [[0.5, 0.6], values])):
        with pytest.raises(ValueError, match=message):
            interval(given, confidence=confidence)
