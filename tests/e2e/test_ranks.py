# SPDX-License-Identifier: Apache-2.0
"""EG-RL on two data-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from tests.e2e import harness
from tests.e2e.rescore import rescore

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROWS, STEPS = 8 * 4, 2
HELPER = """
from embedrl_verl.rewards.functions import no_judge

def compute_score(batch):
    print(f"scores {len(batch)} rows")
    return no_judge.compute_score(batch)
"""


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Two agent-loop workers, micro-batches of one row to three, and rollouts that all have one length.

    So micro-batches of a rank have no media, images or a video while those of the other have something else.
    """
    extra = ["actor_rollout_ref.rollout.agent.num_workers=2", "embedrl.embedder.max_tokens_per_gpu=64"]
    extra += ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=304"]  # the least that holds the longest row
    extra += ["actor_rollout_ref.rollout.ignore_eos=True"]
    folder = tmp_path_factory.mktemp("two")
    (folder / "mine.py").write_text("from helpers import compute_score\n")
    (folder / "helpers.py").write_text(HELPER)
    extra += [f"reward.custom_reward_function.path={folder}/mine.py"]
    run = harness.run(inputs, folder, extra, steps=STEPS, ranks=2)
    assert run.code == 0, run.output[-6000:]
    return run


def test_rewards_depend_on_the_rollouts_alone(run, inputs):
    """Rescored in one process they are those of the run, whatever its agent-loop workers, ranks and micro-batches."""
    for step in range(1, STEPS + 1):
        rows = run.dump("rollouts", step)
        assert len(rows) == ROWS
        expected = torch.tensor([row["score"] for row in rows])
        found = rescore(rows, inputs / "data" / "train.parquet", inputs / "embedder", batch_size=32)
        assert expected.std() > 1e-3, "rewards that are all equal would prove nothing"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_helper_beside_the_reward_file_is_at_work_in_the_trainer_and_its_prints_reach_the_terminal(run):
    assert run.output.splitlines().count(f"scores {ROWS} rows") == STEPS


def test_rollout_and_actor_agree_and_weights_are_synced_after_updates(run):
    for step in range(1, STEPS + 1):
        metrics = run.metrics[step]
        assert metrics["training/rollout_actor_probs_pearson_corr"] >= 0.99
        assert metrics["response_length/min"] == metrics["response_length/max"] == 48
    assert run.metrics[STEPS]["actor/kl_loss"] > 1e-2
    assert run.metrics[STEPS]["training/rollout_probs_diff_mean"] < 1e-3
