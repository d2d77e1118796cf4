# SPDX-License-Identifier: Apache-2.0
"""grpo_advantages is what verl's trainer computes from the same scores, unknown rows included."""

import pytest
import torch

from embedrl_verl.rewards.advantages import grpo_advantages

NAN = float("nan")


def test_by_hand():
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
