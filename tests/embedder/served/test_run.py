# SPDX-License-Identifier: Apache-2.0
"""An EG-RL run that starts its embedding servers itself: rows are embedded while rollouts still run.

The rewards are those of the Embedder in one process.
"""

from __future__ import annotations

import subprocess

import pytest
import torch

from tests.e2e import harness
from tests.e2e.rescore import rescore

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROWS = 8 * 4


def test_servers_of_the_run_give_the_rewards_and_end_with_it(tmp_path):
    harness.prepare(tmp_path)
    settings = {"backend": "server", "server.max_model_len": 1024, "server.servers": 1}
    extra = [f"embedrl.embedder.{name}={value}" for name, value in settings.items()]
    run = harness.run(tmp_path, tmp_path / "run", [*extra, "trainer.val_before_train=False"], steps=1)
    assert run.code == 0, run.output[-6000:]
    rows = run.dump("rollouts", 1)
    assert len(rows) == ROWS
    assert [row["failure"] for row in rows] == [None] * ROWS
    expected = torch.tensor([row["score"] for row in rows])
    assert expected.std() > 1e-3, "rewards that are all equal would prove nothing"
    found = rescore(rows, tmp_path / "data" / "train.parquet", tmp_path / "embedder", batch_size=32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert run.metrics[1]["timing_s/reward_embed"] < 1.0  # vectors are there already
    left = subprocess.run(["pgrep", "-f", "--", f"--model {tmp_path}"], capture_output=True, text=True)
    assert (left.returncode, left.stdout) == (1, ""), "a server has outlived its run"
