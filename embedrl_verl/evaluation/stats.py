# SPDX-License-Identifier: Apache-2.0
"""Means with intervals: over a few seeds (Student's t) and over many queries (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """A mean and the two ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of independent runs (seeds) with Student's t interval; for a gain, pass the differences of paired runs.

    Raises:
        ValueError: fewer than two values, a value is not finite, or confidence outside (0, 1).
    """
    _check(values, confidence)
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = _t_quantile(confidence, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(
    groups: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The plain mean of the groups' means with its percentile bootstrap interval; each group is resampled by itself.

    The same seed gives the same interval.

    Args:
        groups: numbers of queries, by data source or task (one group: the mean over queries); for a gain, the
            differences of two systems query by query.

    Raises:
        ValueError: as in `mean_interval`, of a group; no group, or resamples < 1.
    """
    if not groups or resamples < 1:
        raise ValueError(f"groups and resamples must be at least 1; got {len(groups)} and {resamples}")
    generator, means = torch.Generator().manual_seed(seed), torch.zeros(resamples, dtype=torch.float64)
    data = [torch.as_tensor(group, dtype=torch.float64).cpu() for group in groups]
    for one in data:
        _check(one.tolist(), confidence)
        draws = [one[torch.randint(len(one), one.shape, generator=generator)].mean() for _ in range(resamples)]
        means += torch.stack(draws) / len(data)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(math.fsum(float(one.mean()) for one in data) / len(data), low, high)


def _check(values: Sequence[float], confidence: float) -> None:
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values; got {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite; got {list(values)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}")


def _t_quantile(confidence: float, degrees: int) -> float:
    """t with P(|T| < t) = confidence. With T = sqrt(degrees) tan(a), the density of a is proportional to
    cos(a)**(degrees - 1).
    """
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    area = torch.cumulative_trapezoid(angles.cos() ** (degrees - 1), angles)
    place = int(torch.searchsorted(area, confidence * area[-1]))
    return math.sqrt(degrees) * math.tan(float(angles[place + 1]))
