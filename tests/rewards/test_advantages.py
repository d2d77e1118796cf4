# SPDX-License-Identifier: Apache-2.0
"""grpo_advantages is what verl's trainer computes from the same scores, unknown rows included."""

import pytest
import torch

from embedrl_verl.rewards import fill_with_group_mean
from embedrl_verl.rewards.advantages import grpo_advantages

NAN = float("nan")


def test_by_hand():
    score = torch.tensor([1.0, 3.0, 5.0, 5.0, 5.0, 5.0, NAN, 0.5])
    group = torch.tensor([7, 7, 2, 2, 2, 2, 7, 9])
    # Group 7 is 1, 3 and its mean 2: deviation 1. Group 2 does not vary. Group 9 is one row: its score.
    wanted = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, NAN, 0.5], dtype=torch.float64)
    torch.testing.assert_close(grpo_advantages(score, group), wanted, atol=2e-6, rtol=0, equal_nan=True)
    plain = grpo_advantages(score, group, norm_by_std=False)
    assert plain[:6].tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert grpo_advantages(torch.full((3,), NAN), torch.zeros(3, dtype=torch.int64)).isnan().all()


@pytest.mark.parametrize("norm", [True, False])
def test_equal_to_verl(norm):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 9, (60,), generator=generator)
    score = torch.randn(60, generator=generator)
    score[torch.rand(60, generator=generator) < 0.2] = NAN
    filled = fill_with_group_mean(score, group).nan_to_num(nan=0.0)  # what the trainer hands to verl
    wanted, _ = core_algos.compute_grpo_outcome_advantage(
        filled[:, None].clone(), torch.ones(60, 1), group.numpy(), norm_adv_by_std_in_grpo=norm
    )
    got = grpo_advantages(score, group, norm_by_std=norm)
    assert got.isnan().equal(score.isnan())
    known = ~score.isnan()
    torch.testing.assert_close(got[known].float(), wanted[:, 0][known], atol=1e-5, rtol=1e-5)
