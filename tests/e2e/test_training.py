# SPDX-License-Identifier: Apache-2.0
"""EG-RL through the real engines (verl's trainer, FSDP2, vLLM, Ray, TransferQueue) on tiny models."""

from __future__ import annotations

import json

import pytest
import torch

from embedrl_verl.tiny.environment import CPU_ENV
from embedrl_verl.tiny.judge_model import JudgeSize, TinyJudge
from tests import processes
from tests.e2e import harness
from tests.e2e.judge_faults import LIMIT, FaultyJudge
from tests.e2e.rescore import rescore

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROWS = 8 * 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    harness.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory):
    """3 steps with one agent-loop worker and one rank, and a checkpoint at step 2."""
    folder = tmp_path_factory.mktemp("one")
    first = harness.run(inputs, folder, ["trainer.save_freq=2"], steps=3)
    assert first.code == 0, first.output[-6000:]
    return first


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory):
    """2 steps with two agent-loop workers, two data-parallel ranks and micro-batches of about one row."""
    extra = ["actor_rollout_ref.rollout.agent.num_workers=2", "embedrl.embedder.max_tokens_per_gpu=64"]
    run = harness.run(inputs, tmp_path_factory.mktemp("two"), extra, steps=2, ranks=2)
    assert run.code == 0, run.output[-6000:]
    return run


@pytest.mark.parametrize(("name", "batch_size"), [("one_rank", 1), ("one_rank", 32), ("two_ranks", 32)])
def test_rewards_depend_on_the_rollouts_alone(name, batch_size, inputs, request):
    """The same rollouts rescored in one process, row by row or in a batch, have the rewards that the run gave them,
    whatever its number of agent-loop workers, ranks and micro-batches."""
    run = request.getfixturevalue(name)
    for step in (1, 2):
        rows = run.dump("rollouts", step)
        assert len(rows) == ROWS
        expected = torch.tensor([row["score"] for row in rows])
        found = rescore(rows, inputs / "data" / "train.parquet", inputs / "embedder", batch_size=batch_size)
        assert expected.std() > 1e-3, "rewards that are all equal would prove nothing"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_every_trained_batch_holds_complete_pairs_of_one_source(one_rank):
    for step in (1, 2, 3):
        rows = one_rank.dump("rollouts", step)
        assert len({row["data_source"] for row in rows}) == 1
        seen = {(row["pair_id"], row["side"], row["rollout"]) for row in rows}
        pairs = {row["pair_id"] for row in rows}
        assert seen == {(pair, side, g) for pair in pairs for side in ("query", "target") for g in range(4)}


@pytest.mark.parametrize("name", ["one_rank", "two_ranks"])
def test_rollout_and_actor_agree_and_weights_are_synced_after_updates(name, request):
    """vLLM's log-probs follow the actor's after updates that moved the actor away from where it began."""
    metrics = request.getfixturevalue(name).metrics
    last = max(metrics)
    for step in range(1, last + 1):
        assert metrics[step]["training/rollout_actor_probs_pearson_corr"] >= 0.99
    # The actor has moved far from the (initial) reference, and the rollout moved with it.
    assert metrics[last]["actor/kl_loss"] > 1e-2
    assert metrics[last]["training/rollout_probs_diff_mean"] < 1e-3


def test_validation_reports_retrieval_over_the_whole_set(one_rank):
    metrics = one_rank.metrics[0]
    sources = {name.split("/")[1] for name in metrics if name.startswith("val-core/") and name.endswith("/hit@1")}
    assert {"all", "digits_i2t", "digits_video"} <= sources
    for source in sources:
        assert 0 <= metrics[f"val-core/{source}/hit@1"] <= metrics[f"val-core/{source}/ndcg@5"] <= 1


def test_dumps_hold_the_tcot_and_every_reward_part(one_rank):
    rows = one_rank.dump("rollouts", 1)
    for row in rows:
        assert {"format", "outcome", "score"} <= set(row["reward"])
        assert row["reward"]["score"] == pytest.approx(row["score"])
        assert row["failure"] is None
        assert isinstance(row["problems"], list)
    assert len(one_rank.dump("validation", 0)) == 2 * 4 * 6


def test_metrics_of_a_step_name_every_part(one_rank):
    metrics = one_rank.metrics[1]
    for name in ("reward", "format", "outcome", "hit@1", "well_formed", "evidence", "false_negatives"):
        assert f"embedrl/{name}/mean" in metrics
    assert metrics["embedrl/rows"] == ROWS
    assert metrics["embedrl/failed_rows"] == metrics["embedrl/rollouts_missing"] == 0
    assert metrics["timing_s/reward_embed"] > 0


def by_place(rows: list[dict], what: str) -> dict[tuple, object]:
    return {(row["pair_id"], row["side"], row["rollout"]): row[what] for row in rows}


def test_a_run_resumes_where_it_stopped_with_the_same_rollouts_and_rewards(one_rank, inputs):
    """Step 3 after a resume from step 2 has the pairs, texts and rewards of the unbroken run's step 3."""
    folder = one_rank.folder
    unbroken = one_rank.dump("rollouts", 3)
    before = one_rank.metrics
    step_2 = folder / "checkpoints" / "global_step_2"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={step_2}"]
    resumed = harness.run(inputs, folder, [*resume, "trainer.val_before_train=False"], steps=3)
    assert resumed.code == 0, resumed.output[-6000:]
    again = resumed.dump("rollouts", 3)
    assert by_place(again, "output") == by_place(unbroken, "output")
    assert by_place(again, "score") == pytest.approx(by_place(unbroken, "score"), abs=1e-5)
    assert resumed.metrics[3]["actor/pg_loss"] == pytest.approx(before[3]["actor/pg_loss"], abs=1e-5)
    assert json.loads((step_2 / "embedder.json").read_text())["path"]
    assert set(resumed.metrics) == set(before)  # the first part of the log is kept


@pytest.fixture(scope="module")
def judged(inputs, tmp_path_factory):
    """5 steps with the paper's reward, a judge that meets every fault, and a co-trained Embedder on its own device."""
    folder = tmp_path_factory.mktemp("judged")
    train = {"enable": True, "lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5, "max_anchor_drop": 1.0, "anchor_pairs": 8}
    extra = [f"embedrl.embedder.train.{name}={value}" for name, value in train.items()]
    extra += ["embedrl.embedder.n_gpus_per_node=1", "ray_kwargs.ray_init.num_gpus=2", "trainer.save_freq=2"]
    extra += ["reward.custom_reward_function.path=reward/paper.py", "trainer.val_before_train=False"]
    limits = {"limit": LIMIT, "timeout_s": 4, "retries": 1, "backoff_s": 0.1, "deadline_s": 20, "max_unknown_share": 1}
    extra += [f"embedrl.judge.{name}={value}" for name, value in limits.items()]
    judge = FaultyJudge(folder / "judge", folder / "metrics.jsonl")
    try:
        run = harness.run(inputs, folder, [*extra, f"embedrl.judge.urls=[{judge.url}]"], steps=5)
    finally:
        judge.close()
    assert run.code == 0, run.output[-6000:]
    assert judge.happened == ["killed", "stopped", "garbage", "well"]
    return run


def test_what_a_judge_fails_to_say_is_unknown_and_training_goes_on(judged):
    """Killed in step 2, hanging in step 3, garbage in step 4: its answers count, the others are no misses."""
    rates = [judged.metrics[step]["judge/unknown_rate"] for step in range(1, 6)]
    assert rates[0] == rates[4] == 0 and rates[3] == 1
    assert 0 < rates[1] < 1 and 0 < rates[2] < 1
    for step, rate in enumerate(rates, start=1):
        rows = judged.dump("rollouts", step)
        assert len(rows) == ROWS
        process = [row["reward"]["process"] for row in rows]
        assert process.count(None) == round(rate * ROWS)
        assert all(row["reward"]["score"] is not None for row in rows), "the other terms are still paid"
        assert judged.metrics[step]["embedrl/unknown/process"] == process.count(None)


def test_a_judge_that_always_names_the_first_hits_as_a_blind_one(judged):
    metrics = judged.metrics[1]
    assert metrics["judge/picked_at/1"] == 1
    # 8 lists of 4 own and 3 other candidates, one a prompt: the rate of one step, within 4 standard deviations.
    assert metrics["judge/blind_rate/mean"] == pytest.approx(4 / 7)
    assert abs(metrics["judge/hit_rate/mean"] - 4 / 7) < 4 * (4 / 7 * 3 / 7 / 8) ** 0.5


def test_the_embedder_is_co_trained_on_devices_of_its_own_with_an_average_for_the_rewards(inputs, judged):
    run = judged
    for step in (1, 2):
        metrics = run.metrics[step]
        assert metrics["embedder/updates"] == step and metrics["embedder/active"] == 1
        assert metrics["embedder/rows"] == 8 and metrics["embedder/grad_norm"] > 0.1
        assert 0 <= metrics["embedder/anchor_hit@1"] <= 1
    folder = run.folder / "checkpoints" / "global_step_2"
    assert json.loads((folder / "cotraining.json").read_text())["updates"] == 2
    saved = torch.load(folder / "embedder" / "model_world_size_1_rank_0.pt", weights_only=False)
    average = torch.load(folder / "embedder" / "average_world_size_1_rank_0.pt", weights_only=True)
    from safetensors.torch import load_file

    before = load_file(inputs / "embedder" / "model.safetensors")
    norm = next(value.to_local() for name, value in saved.items() if name.endswith("language_model.norm.weight"))
    start = next(value for name, value in before.items() if name.endswith("norm.weight") and len(value) == len(norm))
    moved = (norm - start).abs().max()
    assert moved > 1e-4
    closest = min((shadow - norm).abs().max() for shadow in average["shadow"] if shadow.shape == norm.shape)
    assert 0 < closest < moved, "the average lies between the beginning and the weights"


def test_stock_main_ppo_runs_the_mode_with_a_judge_that_verl_serves(inputs, tmp_path):
    """The same configuration through verl's own entry point; the judge is a vLLM of verl's reward-model manager."""
    import os
    import subprocess
    from pathlib import Path

    import embedrl_verl.config

    config = Path(embedrl_verl.config.__file__).parent
    command = [processes.python(), "-m", "verl.trainer.main_ppo", f"--config-dir={config}", "--config-name=egrl_trainer"]
    environment = {**os.environ, **CPU_ENV, "VERL_FILE_LOGGER_PATH": str(tmp_path / "metrics.jsonl")}
    TinyJudge(JudgeSize()).save(tmp_path / "judge")
    arguments = [*harness.overrides(inputs, tmp_path, steps=1), "trainer.val_before_train=False"]
    arguments += [f"ray_kwargs.ray_init.runtime_env.py_executable={processes.python()}"]
    arguments += ["reward.custom_reward_function.path=reward/paper.py", "embedrl.judge.style=compact"]
    arguments += ["reward.reward_model.enable=True", f"reward.reward_model.model_path={tmp_path / 'judge'}"]
    arguments += ["reward.reward_model.rollout.prompt_length=496", "reward.reward_model.rollout.max_model_len=512"]
    process = subprocess.run([*command, *arguments], env=environment, text=True, capture_output=True, timeout=900)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert "embedrl-verl" in process.stdout + process.stderr
    assert "is loaded in verl" in process.stdout + process.stderr
    metrics = harness.Run(tmp_path, "", 0).metrics[1]
    assert metrics["embedrl/rows"] == ROWS
    assert metrics["judge/requests"] == ROWS + 2, "one a row; once, which model it is and whether it is vLLM"
    assert metrics["judge/unknown_rate"] == 0, "constrained decoding: also an untrained judge names a candidate"
    assert 0 <= metrics["judge/hit_rate/mean"] <= 1
