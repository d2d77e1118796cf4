# SPDX-License-Identifier: Apache-2.0
"""The CPU platform's rollout servers: one process for engine and model, of one device; a limit that can hold."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.config.rules import (
    check_files,
    check_resumed_step,
    check_run_config,
    last_step,
    refuse_videos_that_megatron_misplaces,
)
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import make_plan

REQUIRED = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl"]
CPU = [*REQUIRED, "platform=cpu", "data.max_prompt_length=256", "data.max_response_length=96"]
BACKEND = "engine_kwargs.vllm.distributed_executor_backend"
JUDGE = [*CPU, "reward.reward_model.enable=True", "reward.reward_model.model_path=/models/judge"]


def test_rollout_and_judge_run_the_model_in_the_engines_process():
    config = compose(JUDGE)
    check_run_config(config)
    for rollout in (config.actor_rollout_ref.rollout, config.reward.reward_model.rollout):
        assert rollout.engine_kwargs.vllm.distributed_executor_backend == "uni"
    # vLLM's CPU build goes back to one more process without it.
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ENABLE_V1_MULTIPROCESSING == "0"


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        ([*CPU, "actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "actor_rollout_ref.rollout"),
        ([*JUDGE, "reward.reward_model.rollout.tensor_model_parallel_size=2"], "reward.reward_model.rollout"),
    ],
)
def test_a_server_of_two_devices_must_have_a_process_for_each(overrides, section):
    with pytest.raises(ConfigError, match=f"{section}.{BACKEND}=uni is for servers of one device; got .* = 2"):
        check_run_config(compose(overrides))
    check_run_config(compose([*overrides, f"actor_rollout_ref.rollout.{BACKEND}=mp"]))


def test_gpu_runs_keep_verls_choice():
    config = compose(CPU[:2])
    assert "distributed_executor_backend" not in config.actor_rollout_ref.rollout.engine_kwargs.get("vllm", {})


def test_a_limit_of_requests_below_the_number_of_those_who_send_is_refused():
    served = [*CPU, "embedrl.embedder.backend=server", "actor_rollout_ref.rollout.agent.num_workers=8"]
    check_run_config(compose([*served, "embedrl.embedder.server.limit=8"]))
    with pytest.raises(ConfigError, match=r"embedrl.embedder.server.limit is shared .* at least 8; got 7"):
        check_run_config(compose([*served, "embedrl.embedder.server.limit=7"]))
    check_run_config(compose([*served, "embedrl.embedder.server.limit=7", "embedrl.embedder.backend=worker"]))


LORA = [
    "embedrl.embedder.train.enable=True",
    "embedrl.embedder.train.lora_rank=8",
    "embedrl.embedder.train.lora_alpha=16",
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"], "needs attention=flash_attention_2; got 2 with"),
        (["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=4"], "flash_attention_2; got 4 with"),
        (["actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=2"], "flash_attention_2; got 2 with"),
        (["actor_rollout_ref.model.override_config.attn_implementation=eager"], "packed rows .* got eager"),
        (["actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.model.lora_rank=8"], "adapters need FSDP2"),
        (["embedrl.embedder.strategy=fsdp", *LORA], "adapters need FSDP2.*embedder.train.lora_rank=8"),
    ],
)
def test_engine_adapter_and_attention_must_go_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_run_config(compose([*CPU[:2], *overrides]))


def test_what_goes_together_passes():
    for overrides in (
        ["attention=flash_attention_2", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
        ["attention=sdpa", "actor_rollout_ref.model.lora_rank=8"],
        ["embedrl.embedder.strategy=fsdp"],
        LORA,
    ):
        check_run_config(compose([*CPU[:2], *overrides]))


def test_a_validation_is_cut_between_pairs():
    for overrides in (["data.val_batch_size=3"], ["data.val_batch_size=4", "data.validation_shuffle=True"]):
        with pytest.raises(ConfigError, match="data.val_batch_size counts prompts, two for each pair"):
            check_run_config(compose([*CPU[:2], *overrides]))
    check_run_config(compose([*CPU[:2], "data.val_batch_size=null", "data.validation_shuffle=True"]))


@pytest.mark.parametrize(
    ("family", "video", "refused"), [("qwen2_5_vl", "p7", True), ("qwen2_5_vl", None, False), ("qwen3_vl", "p7", False)]
)
def test_videos_that_megatron_misplaces_are_refused(family, video, refused):
    config = compose([*CPU[:2], "model_engine=megatron", "actor_rollout_ref.actor.strategy=megatron"])
    data = SimpleNamespace(family=family, first_video=video)
    with pytest.raises(ConfigError, match="p7 has one") if refused else nullcontext():
        refuse_videos_that_megatron_misplaces(config, data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor_rollout_ref.rollout.n=1"], "rollout.n must be at least 2: GRPO compares"),
        (["data.max_prompt_length=31000"], "must hold the longest row: .* = 33048"),
        (["data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2"], "must have two pairs or more"),
        (["+data.sampler.class_path=mine.py"], "data.sampler.class_path must be null"),
    ],
)
def test_a_run_refuses_what_its_dry_run_refuses(overrides, message):
    config = compose([*REQUIRED, *overrides])
    for check in (check_run_config, make_plan):
        with pytest.raises(ConfigError, match=message):
            check(config)
    others = [one for one in overrides if "rollout.n" in one]
    if others:  # an estimator that compares no group
        check_run_config(compose([*REQUIRED, *others, "algorithm.adv_estimator=reinforce_plus_plus"]))


@pytest.mark.parametrize(
    ("steps", "epochs", "last", "said"),
    [(None, 3, 30, False), (12, 3, 12, False), (30, 3, 30, False), (31, 3, 30, True)],
)
def test_a_run_ends_at_the_step_that_its_epochs_allow(steps, epochs, last, said, caplog):
    """verl makes the last checkpoint and validation at that step alone."""
    run = SimpleNamespace(total_training_steps=steps, total_epochs=epochs)
    assert last_step(run, 10) == last
    assert ("step 30 is the last one" in caplog.text) is said


def test_a_checkpoint_of_a_later_step_than_the_last_is_refused(tmp_path):
    check_resumed_step(tmp_path, 30, 30)
    with pytest.raises(ConfigError, match=r"is of step 40, and this run ends at step 30: raise trainer\.total"):
        check_resumed_step(tmp_path, 40, 30)


@pytest.mark.parametrize("odd", ["[1]", "a*", "b?"])
def test_a_model_path_that_vllm_reads_as_a_pattern_is_refused(odd, tmp_path):
    (tmp_path / odd).mkdir()
    (tmp_path / "pairs.parquet").touch()
    files = [f"data.{part}_files={tmp_path}/pairs.parquet" for part in ("train", "val")]
    config = compose([*REQUIRED, *files])
    config.actor_rollout_ref.model.path = f"{tmp_path}/{odd}"
    with pytest.raises(ConfigError, match="actor_rollout_ref.model.path: vLLM reads .* as a pattern; rename it"):
        check_files(config)
