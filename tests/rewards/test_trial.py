# SPDX-License-Identifier: Apache-2.0
"""Comparing a tried function with a dump: what counts as the same, and memory that does not grow with the steps."""

import gc
import weakref

import pytest
import torch

from embedrl_verl.rewards.dump import RewardDump
from embedrl_verl.rewards.trial import grpo_advantages, largest_changes, score_dump, summarise

NAN = float("nan")
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


# What GRPO makes of scores.


def test_advantages_by_hand():
    score = torch.tensor([1.0, 3.0, 5.0, 5.0, 5.0, 5.0, NAN, 0.5])
    group = torch.tensor([7, 7, 2, 2, 2, 2, 7, 9])
    # Group 7 is 1 and 3: deviation sqrt(2). Group 2 does not vary. Group 9 is one row: nothing to compare with.
    half = 0.5**0.5
    wanted = torch.tensor([-half, half, 0.0, 0.0, 0.0, 0.0, NAN, NAN], dtype=torch.float64)
    torch.testing.assert_close(grpo_advantages(score, group), wanted, atol=2e-6, rtol=0, equal_nan=True)
    plain = grpo_advantages(score, group, norm_by_std=False)
    assert plain[:6].tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert grpo_advantages(torch.full((3,), NAN), torch.zeros(3, dtype=torch.int64)).isnan().all()


@pytest.mark.parametrize("norm", [True, False])
def test_known_rows_have_verls_advantages_of_a_group_without_the_unknown_ones(norm):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(0)
    group = torch.randperm(60, generator=generator) % 9
    score = torch.randn(60, generator=generator)
    score[torch.rand(60, generator=generator) < 0.2] = NAN
    known = ~score.isnan()
    assert 2 <= torch.bincount(group[known]).min() < torch.bincount(group).max()
    wanted, _ = core_algos.compute_grpo_outcome_advantage(
        score[known][:, None].clone(),
        torch.ones(int(known.sum()), 1),
        group[known].numpy(),
        norm_adv_by_std_in_grpo=norm,
    )
    got = grpo_advantages(score, group, norm_by_std=norm)
    assert got.isnan().equal(score.isnan())
    torch.testing.assert_close(got[known].float(), wanted[:, 0], atol=1e-5, rtol=1e-5)
