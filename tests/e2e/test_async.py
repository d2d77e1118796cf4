# SPDX-License-Identifier: Apache-2.0
"""A few steps of each asynchronous mode through the real engines; `async_modes.py` is the long run by hand."""

from __future__ import annotations

import pytest

from tests.e2e import async_modes, harness

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 3
PAIRS = {"colocate": 4, "separate": 2}
EXTRA = {
    # Long rollouts, few of them at once, so that updates interrupt some; a validation among them.
    "colocate": [
        *async_modes.COLOCATE,
        *async_modes.BUSY,
        "trainer.v1.colocate_async.num_warmup_batches=2",
        "trainer.test_freq=2",
        "data.val_max_samples=8",
    ],
    # No prompts ahead: every batch is written by the weights of the last update.
    "separate": [*async_modes.SEPARATE, "trainer.v1.separate_async.num_warmup_batches=0"],
}


@pytest.fixture(scope="module", params=["colocate", "separate"])
def run(request, inputs, tmp_path_factory):
    """(mode, finished run): rollouts on the training devices, and on a server of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    finished = harness.run(inputs, folder, [*EXTRA[request.param], "trainer.val_before_train=False"], steps=STEPS)
    assert finished.code == 0, finished.output[-6000:]
    return request.param, finished


def test_every_trained_batch_holds_whole_pairs_of_one_source(run):
    mode, finished = run
    for step in range(1, STEPS + 1):
        batches = async_modes.batches(finished, step)
        assert len(batches) == 4 // PAIRS[mode]
        for rows in batches:
            async_modes.check_whole_pairs(rows, pairs=PAIRS[mode], rollouts=4)


def test_rewards_are_those_of_synchronous_training_on_the_same_rollouts(run, inputs):
    _, finished = run
    for rows in async_modes.batches(finished, STEPS):
        assert len({row["score"] for row in rows}) > 1, "rewards that are all equal would prove nothing"
        assert async_modes.largest_difference(rows, inputs) < async_modes.LIMIT


def test_metrics_tell_the_age_and_count_the_run_once(run):
    mode, finished = run
    for step in range(1, STEPS + 1):
        metrics = finished.metrics[step]
        ages = [metrics[f"embedrl/off_policy_age/{name}"] for name in ("min", "mean", "max")]
        assert ages == sorted(ages) and ages[0] >= 0 and ages[2] < 8
        assert metrics["embedrl/total_steps"] == STEPS and metrics["embedrl/rollouts_missing"] == 0
        assert metrics["embedrl/rows"] == 2 * 4 * PAIRS[mode]
    assert finished.metrics[STEPS]["embedrl/off_policy_age/max"] == {"colocate": 2, "separate": 0}[mode]


def test_updates_interrupt_rollouts_and_validation_runs_among_them(run):
    mode, finished = run
    spans = [finished.metrics[step]["training/off_policy/trajectory_spans/max"] for step in range(1, STEPS + 1)]
    if mode == "colocate":
        assert max(spans) > 1
        assert "val-core/all/hit@1" in finished.metrics[2]
        assert len(finished.dump("validation", 2)) == 8
    else:
        assert max(spans) == 1, "weights come when no rollout is in flight"


def test_new_weights_reach_servers_of_their_own(run):
    """The server's log-probs are the actor's after updates that moved it, also in the mini-batch after an update, whose
    log-probs are those of the weights that had been put aside."""
    mode, finished = run
    if mode == "colocate":
        pytest.skip("its rollouts are of older weights")
    last = finished.metrics[STEPS]
    assert last["actor/kl_loss"] > 1e-2
    assert last["training/off_policy/trajectory_staleness_worst/max"] == 0
    assert last["training/rollout_actor_probs_pearson_corr"] > 0.99
