# SPDX-License-Identifier: Apache-2.0
"""Stock verl, stock vLLM, a tiny Qwen2-VL with images, no GPU: plain GRPO through `python -m verl.trainer.main_ppo`."""

import pytest

from tests.platforms import plain_grpo

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Three steps on two ranks, each rank's shard with rows of one length only."""
    folder = tmp_path_factory.mktemp("grpo")
    return plain_grpo.run(folder, ["actor_rollout_ref.rollout.ignore_eos=True"], steps=3, ranks=2, lengths=1)


def test_the_served_model_is_the_trained_one_at_every_step(steps):
    """Rollout and actor agree before and after updates that have moved the weights far from the reference."""
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.99
        assert step["training/rollout_probs_diff_max"] < 0.05
    assert steps[0]["actor/kl_loss"] < 1e-6, "the first update starts from the reference"
    assert steps[2]["actor/kl_loss"] > 1e-3, "weights that had not moved would prove nothing"


def test_two_ranks_train_on_sequences_of_one_length(steps):
    """On which verl's own worker fails (training_worker.rebuild_position_ids)."""
    for step in steps:
        assert step["response_length/min"] == step["response_length/max"] == 32
        assert step["prompt_length/min"] == step["prompt_length/max"]
