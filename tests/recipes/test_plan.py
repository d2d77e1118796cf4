# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: its arithmetic, and every mistake as one message with exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.cli import main
from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.plan import BatchPlan, make_plan
from recipes.tiny_digits.models import build_tiny_model

REQUIRED = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl"]


def batch(**changes: int) -> BatchPlan:
    numbers = {
        "prompts": 64,
        "rollouts": 8,
        "mini_prompts": 32,
        "devices": 32,
        "model_parallel": 1,
        "rollout_parallel": 1,
    }
    return BatchPlan(**{**numbers, **changes})


def test_every_number_of_a_step_follows_from_six() -> None:
    plan = batch(model_parallel=4, rollout_parallel=2)
    assert (plan.pairs, plan.rows, plan.updates, plan.mini_rows, plan.data_parallel) == (32, 512, 2, 256, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 63}, "must be even; got 63"),
        ({"mini_prompts": 48}, "must be divisible by actor_rollout_ref.actor.ppo_mini_batch_size \\(48\\)"),
        ({"devices": 24}, "must be divisible by the 24 data-parallel ranks"),
        ({"devices": 8, "model_parallel": 3}, "model-parallel size \\(3\\)"),
        ({"devices": 8, "rollout_parallel": 3}, "one rollout replica \\(3"),
    ],
)
def test_a_number_that_does_not_divide_is_named_with_its_key(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batch(**changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=66", "must be divisible by actor_rollout_ref.actor.ppo_mini_batch_size"),
        ("embedrl.embeder.path=x", "cannot be composed"),
        ("+embedrl.embedder.pth=x", "embedrl.embedder has no key pth"),
        ("+data.embedrl.famly=x", "unknown key data.embedrl.famly"),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024", "must hold the longest row"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size=1", "verl's validator refuses"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["actor_rollout_ref.actor.use_dynamic_bsz=False"] if "micro_batch_size" in override else []
    assert main(["plan", *REQUIRED, *extra, override]) == 2
    error = capsys.readouterr().err
    assert "ConfigError: " in error
    assert message in error
    assert "Traceback" not in error


def test_files_are_counted_in_pairs_and_missing_ones_marked(tmp_path: Path) -> None:
    train = tmp_path / "train.parquet"
    pq.write_table(pa.table({"pair_id": [str(number) for number in range(96)]}), train)
    plan = str(make_plan(compose([*REQUIRED, f"data.train_files=[{train}]", f"data.val_files={tmp_path}/val.parquet"])))
    assert f"{train} (96 pairs) = 3 steps an epoch" in plan
    assert f"{tmp_path}/val.parquet (not found here)" in plan


def test_a_data_set_folder_counts_as_its_parts_and_an_unfinished_one_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        table = pa.table({"pair_id": [f"{number}-{row}" for row in range(48)]})
        pq.write_table(table, tmp_path / f"part-0000{number}.parquet")
    override = [*REQUIRED, f"data.train_files=[{tmp_path}]"]
    assert f"{tmp_path} (96 pairs) = 3 steps an epoch" in str(make_plan(compose(override)))
    (tmp_path / "_work").mkdir()
    with pytest.raises(ConfigError, match="is unfinished"):
        make_plan(compose(override))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    file.write_text("pair_id,query\n")
    with pytest.raises(ConfigError, match="must be a parquet file of pair records"):
        make_plan(compose([*REQUIRED, f"data.train_files={file}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.custom_reward_function.path=/no/reward.py"], "/no/reward.py"),
        (["reward.custom_reward_function.name=other"], "other"),
        (["reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.paper"], "and no judge"),
        (["+reward.custom_reward_function.reward_kwargs.alfa=1"], "reward_kwargs has no key alfa"),
    ],
)
def test_a_reward_function_that_the_run_would_refuse_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(compose([*REQUIRED, *overrides]))


def test_local_models_that_the_run_would_refuse_are_refused(tmp_path: Path) -> None:
    reasoner = build_tiny_model(tmp_path / "reasoner", family="qwen3_vl")
    with pytest.raises(ConfigError, match=f"family is qwen2_vl, but {reasoner} is a qwen3_vl"):
        make_plan(compose([*REQUIRED, f"actor_rollout_ref.model.path={reasoner}"]))
    plain = build_tiny_model(tmp_path / "plain", with_emb_token=False)
    override = [*REQUIRED, f"embedrl.embedder.path={plain}"]
    with pytest.raises(EmbedderError, match="needs the token <emb>"):
        make_plan(compose(override))
    good = build_tiny_model(tmp_path / "good")
    assert "profile auto: embed_rl" in str(make_plan(compose([*REQUIRED, f"embedrl.embedder.path={good}"])))


def test_gpus_beside_those_of_training_are_counted(tmp_path: Path) -> None:
    apart = ["actor_rollout_ref.hybrid_engine=False", "trainer.v1.trainer_mode=egrl_separate_async"]
    apart += ["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=4"]
    apart += ["trainer.n_gpus_per_node=4", "trainer.v1.separate_async.parameter_sync_step=2"]
    apart += ["actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
    judge = ["reward.reward_model.enable=True", "reward.reward_model.model_path=x/y"]
    judge += ["reward.reward_model.enable_resource_pool=True", "reward.reward_model.n_gpus_per_node=2"]
    judge += ["reward.reward_model.nnodes=1"]
    text = str(make_plan(compose([*REQUIRED, "platform=gpu", "trainer.device=cuda", *apart, *judge])))
    assert "for training, 4 for rollouts, 2 for the judge: 10 in all" in text
    text = str(make_plan(compose([*REQUIRED, "trainer.device=cuda", "embedrl.embedder.n_gpus_per_node=3"])))
    assert "3 for the Embedder: 11 in all" in text
    assert "in all" not in str(make_plan(compose([*REQUIRED, "trainer.device=cuda"])))


def test_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan must not start Ray")

    monkeypatch.setattr(ray, "init", refuse)
    make_plan(compose(REQUIRED))
    assert not ray.is_initialized()
