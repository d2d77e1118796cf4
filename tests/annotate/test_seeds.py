# SPDX-License-Identifier: Apache-2.0
"""Draws depend on their key alone."""

import pytest

from embedrl_verl.annotate.seeds import ALMOST_GREEDY, is_in_share, seed_of, temperature_of


def test_seeds_differ_by_every_part_of_the_key_and_never_by_chance():
    keys = [(seed, pair, side, number) for seed in (0, 1) for pair in ("a", "b") for side in "qt" for number in (0, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", "query", 0) == 4365023  # the same on every machine


def test_a_larger_share_holds_the_smaller_one():
    names = [f"p{n}" for n in range(5000)]
    drawn = {share: {name for name in names if is_in_share(share, 0, "gold", name)} for share in (0.0, 0.3, 0.6, 1.0)}
    assert not drawn[0.0] and drawn[0.3] < drawn[0.6] < drawn[1.0] == set(names)
    assert abs(len(drawn[0.3]) / 5000 - 0.3) < 0.03


@pytest.mark.parametrize(
    ("number", "first", "expected"), [(0, 0.0, ALMOST_GREEDY), (1, 0.0, 0.7), (0, 0.5, 0.5), (1, 0.9, 0.9)]
)
def test_later_tries_are_drawn_and_the_first_one_too(number, first, expected):
    """vLLM's CPU sampler heeds no seed in a batch that has a greedy request."""
    assert temperature_of(number, first, 0.7) == expected
