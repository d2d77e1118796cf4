# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: what it counts, and every mistake as one message with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.cli import main
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.plan import make_plan
from recipes.tiny_digits.models import build_tiny_model
from tests.config.runs import REQUIRED, run_config

JUDGE = ["reward.reward_model.enable=True", "reward.reward_model.model_path=x/y"]


def plan(*overrides: str) -> str:
    return str(make_plan(run_config(*overrides)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedrl.embeder.path=x", "cannot be composed"),
        ("+embedrl.embedder.pth=x", "embedrl.embedder has no key pth"),
        ("+data.embedrl.famly=x", "data.embedrl has no key famly"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size=1", "verl's validator refuses"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["actor_rollout_ref.actor.use_dynamic_bsz=False"] if "micro_batch_size" in override else []
    assert main(["plan", *REQUIRED, *extra, override]) == 2
    error = capsys.readouterr().err
    assert "ConfigError: " in error and message in error and "Traceback" not in error


def test_files_and_folders_are_counted_in_pairs_and_missing_ones_marked(tmp_path: Path) -> None:
    one = tmp_path / "one.parquet"
    for file in (tmp_path / "part-00000.parquet", tmp_path / "part-00001.parquet", one):
        write_pairs((PairRecord(f"{file}{n}", "s", "", Item("q"), Item("t")) for n in range(48)), file)
    text = plan(f"data.train_files=[{tmp_path},{one}]", f"data.val_files={tmp_path}/val.parquet")
    assert f"{tmp_path} (96 pairs); {one} (48 pairs) = 4 steps an epoch" in text
    assert f"{tmp_path}/val.parquet (not found here)" in text
    assert "steps an epoch" not in plan(f"data.train_files=[{tmp_path},gone.parquet]")
    with pytest.raises(ConfigError, match="is named twice"):
        plan(f"data.train_files=[{tmp_path},{tmp_path}/part-00000.parquet]")
    (tmp_path / "_work").mkdir()
    with pytest.raises(ConfigError, match="is unfinished"):
        plan(f"data.train_files=[{tmp_path}]")
    one.write_text("pair_id,query\n")
    with pytest.raises(
        ConfigError, match="must hold pair records that can be used; got .*one.parquet: not a readable parquet file"
    ):
        plan(f"data.train_files={one}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.custom_reward_function.path=/no/reward.py"], "/no/reward.py"),
        (["reward.custom_reward_function.name=other"], "other"),
        (["reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.paper"], "needs a judge"),
        (["reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.gain"], "raw_embeddings=True"),
        (["+reward.custom_reward_function.reward_kwargs.alfa=1"], "reward_kwargs has no key alfa"),
        (["embedrl.judge.urls=['ftp://judge']"], "embedrl.judge.urls: a server's URL must read"),
    ],
)
def test_what_the_run_would_refuse_of_reward_function_and_judge_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*overrides)


def test_local_models_that_the_run_would_refuse_are_refused(tmp_path: Path) -> None:
    reasoner = build_tiny_model(tmp_path / "reasoner", family="qwen3_vl")
    with pytest.raises(ConfigError, match=f"family is qwen2_vl, but {reasoner} is a qwen3_vl"):
        plan(f"actor_rollout_ref.model.path={reasoner}")
    no_token = build_tiny_model(tmp_path / "plain", with_emb_token=False)
    with pytest.raises(EmbedderError, match="needs the token <emb>"):
        plan(f"embedrl.embedder.path={no_token}")
    good = build_tiny_model(tmp_path / "good")
    assert "profile auto: embed_rl" in plan(f"embedrl.embedder.path={good}")


def test_gpus_beside_those_of_training_are_counted() -> None:
    apart = ["actor_rollout_ref.hybrid_engine=False", "trainer.v1.trainer_mode=egrl_separate_async"]
    apart += ["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=4"]
    apart += ["trainer.n_gpus_per_node=4", "trainer.v1.separate_async.parameter_sync_step=2"]
    apart += ["actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
    pool = [f"reward.reward_model.{one}" for one in ("enable_resource_pool=True", "n_gpus_per_node=2", "nnodes=1")]
    assert "for training, 4 for rollouts, 2 for the judge: 10 in all" in plan(*apart, *JUDGE, *pool)
    assert "3 for the Embedder: 11 in all" in plan("embedrl.embedder.n_gpus_per_node=3")
    assert "2 for the Embedder: 10 in all" in plan(
        *(f"embedrl.embedder.{one}" for one in ("backend=server", "server.servers=2"))
    )
    assert "in all" not in plan()


@pytest.mark.parametrize(("here", "said"), [(8, "simulated: this machine has 8"), (11, "as here")])
def test_devices_of_this_machine_are_held_against_all_that_the_run_needs(monkeypatch, here: int, said: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: here)
    monkeypatch.setenv("GPU_MEMORY", "80")
    assert f"1 x 8 = 8 GPUs ({said}) for training, 3 for the Embedder" in plan("embedrl.embedder.n_gpus_per_node=3")


def test_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("a plan must not start Ray"))
    plan()
    assert not ray.is_initialized()
