# SPDX-License-Identifier: Apache-2.0
"""EG-RL with the Embedder behind a vLLM server, and in a sentence-transformers process; both are killed in a step.

Rows are embedded while rollouts still run. In step 2 the process that embeds is killed (kill -9) when it has answered
some of its rows, and the reward stage then waits until it is back, so that step 3 has one again. The server's owner is
held from then until the reward stage (kill -STOP), so that no other row of the step has a vector, however slow or fast
a machine starts a server. The run with the server is started by verl's own entry point, with a judge that verl serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import embedrl_verl.config
from embedrl_verl.embedder.served import guard
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.judge_model import TinyJudge
from tests.e2e import harness, killer
from tests.e2e.killer import Killer
from tests.e2e.rescore import rescore

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROWS = 8 * 4
EMBEDDED = 20  # rows of step 2 that the server has answered when it is killed
LOST = 3  # answers of those that may not have been taken yet; with the other rows, less than one of two mini-batches
WHILE_IT_IS_DOWN = ("connection lost", "connection refused", "no server is up", "deadline")
# Rollouts end one after another; of the killed process some rows are embedded, some not.
EXTRA = ["actor_rollout_ref.rollout.max_num_seqs=1", "trainer.val_before_train=False"]


def finished(
    inputs: Path, kills: Killer, folder: Path, extra: list[str], *, steps: int, entry: Sequence[str] = harness.ENTRY
) -> harness.Run:
    kills.start()
    try:
        run = harness.run(inputs, folder, [*EXTRA, *kills.overrides, *extra], steps=steps, entry=entry)
    finally:
        kills.over.set()
        kills.join()
    assert run.code == 0, run.output[-6000:]
    assert kills.happened == ["killed", "back"]
    assert kills.started is not None
    assert killer.ends(kills.started, within_s=guard.GRACE_S + 5), "what embeds has outlived its run"
    return run


@pytest.fixture(scope="module")
def served(inputs, tmp_path_factory):
    """3 steps by stock `main_ppo`, with an embedding server that the run starts, for which a row waits 20 s, and a
    judge: a vLLM of verl's reward-model manager."""
    folder = tmp_path_factory.mktemp("served")
    TinyJudge().save(folder / "judge")
    config = Path(embedrl_verl.config.__file__).parent
    entry = ["-m", "verl.trainer.main_ppo", f"--config-dir={config}", "--config-name=egrl_trainer"]
    settings: dict[str, Any] = {"embedder.backend": "server", "embedder.server.servers": 1}
    settings |= {"embedder.server.max_model_len": 1024, "embedder.server.deadline_s": 20}
    settings |= {"reward.max_failed_share": 0.99, "judge.style": "compact"}
    judge = {"enable": True, "model_path": folder / "judge"}
    judge |= {"rollout.prompt_length": 496, "rollout.max_model_len": 512}
    extra = [
        *(f"embedrl.{name}={value}" for name, value in settings.items()),
        *(f"reward.reward_model.{name}={value}" for name, value in judge.items()),
        f"ray_kwargs.ray_init.runtime_env.py_executable={python()}",
    ]
    kills = Killer(
        folder, killer.server, killer.answered, lambda one: killer.answer(one, "/health"), after=EMBEDDED,
        meanwhile=killer.owner_held, function="paper",
    )  # fmt: skip
    return finished(inputs, kills, folder, extra, steps=3, entry=entry)


@pytest.fixture(scope="module")
def sentence(inputs, tmp_path_factory):
    """2 steps with the Embedder as a sentence-transformers model."""
    folder = tmp_path_factory.mktemp("sentence")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "huggingface").symlink_to(inputs / "embedder")
    export_checkpoint(folder / "checkpoint", folder / "model", kind="embedder")
    kills = Killer(folder, killer.sentence_actor, killer.worked, lambda one: True, after=1)
    extra = ["embedrl.embedder.backend=sentence_transformers", f"embedrl.embedder.path={folder / 'model'}"]
    return finished(inputs, kills, folder, extra, steps=2)


def check_rewards(run: harness.Run, step: int, inputs: Path) -> list[dict]:
    """The outcomes of the rows that have a vector are those of the Embedder in one process (unknown for those whose own
    candidates have none); returns the other rows."""
    rows = run.dump("rollouts", step)
    assert len(rows) == ROWS
    present, failed = ([row for row in rows if (row["failure"] is None) == kept] for kept in (True, False))
    outcomes = [row["reward"]["outcome"] for row in present]
    expected = torch.tensor([math.nan if outcome is None else outcome for outcome in outcomes])
    assert expected[~expected.isnan()].std() > 1e-3, "rewards that are all equal would prove nothing"
    parquet = inputs / "data" / "train.parquet"
    found = rescore(present, parquet, inputs / "embedder", batch_size=32, part="outcome")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, equal_nan=True)
    return failed


def test_a_server_of_the_run_gives_the_embedders_rewards_also_after_it_was_killed(served, inputs):
    for step in (1, 3):
        assert check_rewards(served, step, inputs) == []
        assert served.metrics[step]["embedrl/failed_rows"] == 0
        metrics = served.metrics[step]
        assert metrics["timing_s/reward_embed"] < metrics["timing_s/gen"] / 4  # vectors are there already


def test_rows_that_a_killed_server_leaves_without_a_vector_are_counted_and_unknown(served, inputs):
    failed = check_rewards(served, 2, inputs)
    assert 0 < len(failed) <= ROWS - EMBEDDED + LOST
    assert served.metrics[2]["embedrl/failed_rows"] == len(failed)
    causes = {f"embedding server: {why}" for why in WHILE_IT_IS_DOWN}
    assert {row["failure"] for row in failed} <= causes
    assert [row["score"] for row in failed] == [None] * len(failed)
    assert "NaN" not in (served.folder / "rollouts" / "2.jsonl").read_text()


def test_stock_main_ppo_runs_the_mode_with_a_judge_that_verl_serves(served):
    assert "embedrl-verl" in served.output and "is loaded in verl" in served.output
    metrics = served.metrics[1]
    assert metrics["embedrl/rows"] == ROWS
    assert metrics["judge/requests"] == ROWS + 1, "one a row; once, which model it is"
    assert metrics["judge/unknown_rate"] == 0, "constrained decoding: also an untrained judge names a candidate"
    assert 0 <= metrics["judge/hit_rate/mean"] <= 1


def test_a_killed_sentence_transformers_process_is_started_again_and_no_row_is_lost(sentence, inputs):
    for step in (1, 2):
        assert check_rewards(sentence, step, inputs) == []
        assert sentence.metrics[step]["embedrl/failed_rows"] == 0


@pytest.mark.parametrize("name", ["served", "sentence"])
def test_training_goes_on(name, request):
    for metrics in request.getfixturevalue(name).metrics.values():
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["actor/grad_norm"] > 0
