# SPDX-License-Identifier: Apache-2.0
"""Comparing a tried function with a dump: what counts as the same, and memory that does not grow with the steps."""

import gc
import weakref

import pytest
import torch

from embedrl_verl.rewards.dump import RewardDump
from embedrl_verl.rewards.trial import largest_changes, score_dump, summarise

OTHER_NAN = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)  # 0xffc00000, what 0 / 0 gives on x86


@pytest.fixture
def trial(make_batch):
    """Tries a score on a made-up dump of 4 rows (one group a side) with another score."""

    def run(old, new, **change):
        rows = [{"pair_id": f"p{i}", "data_source": "s", "text": f"t{i}"} for i in range(4)]
        batch = make_batch(1, 2, rows=torch.arange(4))
        dump = RewardDump("x", {"score": torch.as_tensor(old)}, rows, "", batch)
        return score_dump(lambda _: {"score": torch.as_tensor(new)}, "f", dump, **change)

    return run


def test_identical_is_bit_for_bit_but_unknown_is_unknown(trial):
    old = torch.tensor([0.0, 1.0, float("nan"), 0.1])
    other = torch.cat((old[:2], OTHER_NAN, old[3:]))
    for new, same in ((old, True), (other, True), (old.index_fill(0, torch.tensor([0]), -0.0), False)):
        assert summarise([trial(old, new)], "1").identical is same
    assert not summarise([trial(old, old.nextafter(torch.ones(4)))], "1").identical


def test_changes_of_several_steps_are_merged_by_size(trial):
    steps = [
        trial([0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], step="1", limit=3),  # both query rows by 1.41
        trial([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], step="2", limit=1),  # both target rows by 0.71, one is told
    ]
    told = [(change.step, change.side, change.rollout, change.text) for change in largest_changes(steps, 9)]
    assert told == [("1", "query", 0, "t0"), ("1", "query", 1, "t1"), ("2", "target", 0, "t2")]
    assert len(largest_changes(steps, 2)) == 2


def test_what_only_one_of_them_knows_is_counted_and_not_compared(trial):
    step = trial([0.0, 1.0, 0.0, 1.0], [0.0, float("nan"), 1.0, 0.0])
    found = summarise([step], "1")
    # Row 0 has a score of both, but from the second function no advantage: it is alone in its group.
    assert found.unknown == (0, 1) and found.sign_flips == 1.0
    assert {change.text for change in step.changes} == {"t2", "t3"}


def test_a_scored_step_lets_the_similarities_go(trial, make_batch):
    batch = make_batch(1, 2)
    alive = weakref.ref(batch.similarity)
    rows = [{"pair_id": "p", "data_source": "s", "text": "t"}] * 4
    dump = RewardDump("x", {"score": torch.zeros(4)}, rows, "", batch)
    step = score_dump(lambda b: {"score": torch.arange(4.0)}, "f", dump)
    assert alive() is not None
    del batch, dump
    gc.collect()
    assert alive() is None and len(step.changes) == 4
