# SPDX-License-Identifier: Apache-2.0
"""Stage 1's batches: single-source parts, weights, few videos a batch, the same plan in every run."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.sampler import SubBatchPlan

SOURCES = ["a"] * 40 + ["b"] * 24 + ["film"] * 16


def plan(sources=SOURCES, **settings) -> SubBatchPlan:
    values = {"batch_pairs": 8, "sub_batch_pairs": 4, "video_sources": {"film"}, "seed": 3, **settings}
    return SubBatchPlan(sources, **values)


def parts(batch) -> list[str]:
    """Source of each sub-batch; fails if one is mixed."""
    found = []
    for part in batch.pairs.reshape(-1, 4):
        (source,) = {SOURCES[i] for i in part}
        found.append(source)
    return found


def test_every_part_of_a_batch_has_one_source_and_no_pair_twice():
    batches = plan().epoch(0)
    assert len(batches) == 80 // 8
    for batch in batches:
        assert len(batch.pairs) == 8
        for part in batch.pairs.reshape(-1, 4):
            assert len(set(part.tolist())) == 4
        parts(batch)
    seen = Counter(int(i) for batch in batches for i in batch.pairs)
    assert set(seen) == set(range(80)) and set(seen.values()) == {1}


@pytest.mark.parametrize("most", [1, 2])
def test_a_batch_has_at_most_so_many_video_parts(most):
    for epoch in range(5):
        counts = [parts(batch).count("film") for batch in plan(max_video_sub_batches=most).epoch(epoch)]
        assert max(counts) <= most
        assert sum(counts) == 4, "all video parts find a place here"


def test_weights_multiply_what_is_drawn_of_a_source():
    drawn = Counter(source for b in plan(weights={"b": 2.0, "a": 0.5}).epoch(0) for source in parts(b))
    assert drawn <= Counter({"a": 5, "b": 12, "film": 4})
    assert drawn.total() == 20, "21 parts, one of them has no partner"


def test_epochs_differ_and_every_run_makes_the_same():
    one, again, other = plan(), plan(), plan(seed=4)
    for epoch in (0, 1):
        mine = [batch.pairs for batch in one.epoch(epoch)]
        assert all(np.array_equal(a, b.pairs) for a, b in zip(mine, again.epoch(epoch), strict=True))
        assert not all(np.array_equal(a, b.pairs) for a, b in zip(mine, other.epoch(epoch), strict=True))
    assert not np.array_equal(one.epoch(0)[0].pairs, one.epoch(1)[0].pairs)


@pytest.mark.parametrize("done", [0, 1, 9, 10, 11, 25])
def test_going_on_after_some_updates_gives_the_rest_of_the_unbroken_run(done):
    whole = list(islice(plan(raw_share=0.5).from_step(0), 40))
    rest = list(islice(plan(raw_share=0.5).from_step(done), 40 - done))
    assert all(np.array_equal(a.pairs, b.pairs) and a.raw == b.raw for a, b in zip(whole[done:], rest, strict=True))


def test_the_share_of_raw_batches_is_kept():
    assert not any(batch.raw for batch in plan().epoch(0))
    assert all(batch.raw for batch in plan(raw_share=1.0).epoch(0))
    raw = [batch.raw for batch in islice(plan(raw_share=0.25).from_step(0), 1000)]
    assert 0.2 < np.mean(raw) < 0.3


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        (["a"] * 8 + ["b"] * 3, {}, r"too few in b \(3 pairs\)"),
        (["a"] * 8, {"weights": {"a": 0.1}}, r"too few in a \(8 pairs\).*raise the source's weight"),
        (["a"] * 8, {"weights": {"c": 1.0}}, "source_weights names c; the data has a"),
        (["film"] * 40, {}, "at most 1 video sub-batch"),
        (["a"] * 4, {}, "has no batch of 8 pairs"),
    ],
)
def test_what_cannot_fill_batches_is_named(sources, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(sources, **settings)
