# SPDX-License-Identifier: Apache-2.0
"""What must fit together in a run's settings: each rule refuses by name, and a run refuses what its plan refuses."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from embedrl_verl.config.batch import BatchPlan
from embedrl_verl.config.rules import (
    check_family,
    check_files,
    check_resumed_step,
    check_run_config,
    last_step,
    no_such_model,
    refuse_videos_that_megatron_misplaces,
)
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import make_plan
from tests.config.runs import run_config

ROLES = "actor_rollout_ref"
EXECUTOR = "engine_kwargs.vllm.distributed_executor_backend"
CPU = ("platform=cpu", "data.max_prompt_length=256", "data.max_response_length=96")
COLOCATE = (*CPU, "trainer.v1.trainer_mode=egrl_colocate_async")
SEPARATE = (
    *(*CPU, "trainer.v1.trainer_mode=egrl_separate_async", "trainer.v1.separate_async.parameter_sync_step=2"),
    f"{ROLES}.rollout.nnodes=1",
)
JUDGE = ("reward.reward_model.enable=True", "reward.reward_model.model_path=/models/judge")
TRAINED = ("embedrl.embedder.train.enable=True",)
LORA = (*TRAINED, "embedrl.embedder.train.lora_rank=8", "embedrl.embedder.train.lora_alpha=16")
MEGATRON = (
    *("model_engine=megatron", "data.embedrl.family=qwen3_vl", f"{ROLES}.model.use_fused_kernels=False"),
    *(f"{ROLES}.{role}.strategy=megatron" for role in ("actor", "ref")),
    f"~{ROLES}.actor.grad_clip",
)
SPLIT = tuple(f"{ROLES}.actor.megatron.{kind}_model_parallel_size=2" for kind in ("tensor", "pipeline"))
FOUR_ROWS = ("data.train_batch_size=4", f"{ROLES}.actor.ppo_mini_batch_size=2", f"{ROLES}.rollout.n=2")
SIXTEEN = ("trainer.nnodes=2", "trainer.n_gpus_per_node=8")

REFUSED = [
    # the batch
    (["data.train_batch_size=63"], "data.train_batch_size must be even: it counts prompts, two for each pair; got 63"),
    ([*COLOCATE, "data.train_batch_size=63"], "must be even"),
    ([f"{ROLES}.actor.ppo_mini_batch_size=48"], r"train_batch_size must be divisible by .*size \(48\).*; got 64"),
    (["data.train_batch_size=2", f"{ROLES}.actor.ppo_mini_batch_size=2"], "must have two pairs or more .*, and has 1"),
    ([f"{ROLES}.rollout.n=1"], "rollout.n must be 2 or more: GRPO compares"),
    (["trainer.n_gpus_per_node=3"], "divisible by the 3 data-parallel ranks: .* = 32 x 8 = 256 rows; got 32"),
    (["trainer.n_gpus_per_node=0"], r"all 0 devices .* model-parallel size \(1\); got 0"),
    ([*FOUR_ROWS, *SIXTEEN], "divisible by the 16 data-parallel ranks: .* = 2 x 2 = 4 rows"),
    (
        ["attention=flash_attention_2", f"{ROLES}.actor.ulysses_sequence_parallel_size=3"],
        r"all 8 devices .* divisible by the actor's model-parallel size \(3\); got 8",
    ),
    ([f"{ROLES}.rollout.tensor_model_parallel_size=3"], r"divisible by the size of one rollout replica \(3:"),
    (["data.max_prompt_length=31000"], "must be at least the longest row: .* = 33048; got 32768"),
    (["data.embedrl.pairs_together=5"], "pairs_together must be a divisor of the 32 pairs of a batch; got 5"),
    (["data.val_batch_size=3"], "data.val_batch_size must be even: it counts prompts"),
    (["data.validation_shuffle=True"], "data.validation_shuffle must be False, or data.val_batch_size null"),
    (["+data.gen_batch_size=32"], "data.gen_batch_size must be null"),
    # verl's keys
    (["+data.sampler.class_path=mine.py"], "data.sampler.class_path must be null: .*; got mine.py"),
    (["reward.num_workers=2"], "reward.num_workers must be 0: the reward needs the whole batch; got 2"),
    (["reward.reward_manager.name=naive"], "reward.reward_manager.name must be embedder_guided: .*; got naive"),
    (["+algorithm.filter_groups.enable=True"], "algorithm.filter_groups.enable must be False"),
    (["+trainer.v1.sampler.sync_refill_failed_groups=True"], "sync_refill_failed_groups must be False"),
    ([f"{ROLES}.rollout.agent.default_agent_loop=tool_agent"], "default_agent_loop must be tcot, .*; got tool_agent"),
    ([*JUDGE, "embedrl.judge.urls=['http://a']"], r"embedrl.judge.urls must be \[\] with reward.reward_model.enable"),
    (["reward.reward_model.enable=True"], "reward.reward_model.model_path must be a folder or hub id .*; got null"),
    (["reward.custom_reward_function.path=null"], "path must be a reward function: .*; got null"),
    # engines, adapters, attention, executors
    (
        [f"{ROLES}.actor.ulysses_sequence_parallel_size=2"],
        "actor.ulysses_sequence_parallel_size must be 1 with attention=torch_varlen: it needs flash_attention_2; got 2",
    ),
    ([f"{ROLES}.actor.fsdp_config.ulysses_sequence_parallel_size=4"], "needs flash_attention_2; got 4"),
    ([f"{ROLES}.ref.fsdp_config.ulysses_sequence_parallel_size=2"], "needs flash_attention_2; got 2"),
    ([f"{ROLES}.model.override_config.attn_implementation=eager"], "for packed rows .* got eager"),
    ([f"{ROLES}.actor.strategy=fsdp", f"{ROLES}.model.lora_rank=8"], "actor.strategy must be fsdp2 with an adapter"),
    ([*MEGATRON, "data.embedrl.family=qwen2_vl"], r"Megatron engine can load \(qwen2_5_vl.*; got qwen2_vl"),
    (
        [*CPU, f"{ROLES}.rollout.tensor_model_parallel_size=2"],
        f"{ROLES}.rollout.{EXECUTOR} must be mp: a server has 2 devices .*; got uni",
    ),
    (
        [*CPU, *JUDGE, "reward.reward_model.rollout.tensor_model_parallel_size=2"],
        f"reward.reward_model.rollout.{EXECUTOR} must be mp: a server has 2 devices",
    ),
    # the Embedder
    (["embedrl.embedder.strategy=fsdp", *LORA], "embedrl.embedder.strategy must be fsdp2 with an adapter"),
    (["embedrl.embedder.strategy=fsdp", *CPU], "embedrl.embedder.strategy must be fsdp2 on a CPU; got fsdp"),
    (
        ["embedrl.embedder.strategy=megatron", "embedrl.embedder.tensor_model_parallel_size=3"],
        r"\(3\) divides the Embedder's 8 devices",
    ),
    (
        ["embedrl.embedder.backend=server", "embedrl.embedder.server.limit=7"],
        r"embedrl.embedder.server.limit must be at least 8: it is shared out .*; got 7",
    ),
    ([*TRAINED, "embedrl.embedder.n_gpus_per_node=65"], "each of the Embedder's 65 .* at most 64 of a batch; got best"),
    ([*SEPARATE, *TRAINED, "embedrl.embedder.n_gpus_per_node=40"], "at most 32 of a batch; got best"),
    # the asynchronous modes
    ([f"{ROLES}.hybrid_engine=False"], "hybrid_engine must be True with trainer mode egrl_sync"),
    ([*COLOCATE, f"{ROLES}.hybrid_engine=False"], "hybrid_engine must be True"),
    *(
        ([*COLOCATE, f"trainer.v1.sampler.max_off_policy_threshold={wrong}"], "must be 1 or more, or null for no limit")
        for wrong in ("0", "-1", "1.5")
    ),
    ([*COLOCATE, "trainer.v1.sampler.max_off_policy_strategy=skip"], "must be drop or wait; got skip"),
    ([*COLOCATE, "trainer.v1.colocate_async.num_warmup_batches=-1"], "colocate_async.num_warmup_batches must be 0"),
    ([*COLOCATE, "skip.rollout_tq.enable=True"], "skip.rollout_tq.enable must be False"),
    ([*SEPARATE, "trainer.v1.separate_async.parameter_sync_step=0"], "parameter_sync_step must be 1 or more; got 0"),
    *(
        ([*SEPARATE, f"trainer.v1.separate_async.parameter_sync_step={steps}"], rf"parameter_sync_step \({steps}\) x")
        for steps in (1, 4)
    ),
    (
        [*SEPARATE, "data.train_batch_size=6", f"{ROLES}.actor.ppo_mini_batch_size=3"],
        "ppo_mini_batch_size must be a multiple of the 2 prompts that stay together .*; got 3",
    ),
    ([*SEPARATE, "data.embedrl.pairs_together=32"], "must be a multiple of the 64 prompts that stay together"),
    ([*SEPARATE, f"{ROLES}.rollout.nnodes=0"], r"nnodes x n_gpus_per_node \(0\).* one replica's 1; got 0"),
    ([*SEPARATE, f"{ROLES}.rollout.checkpoint_engine.backend=naive"], "must be one that reaches other processes"),
    ([*SEPARATE, *JUDGE], "reward.reward_model.enable_resource_pool must be True: rollouts never pause"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_a_run_refuses_what_its_dry_run_refuses(overrides, message):
    config = run_config(*overrides)
    for check in (check_run_config, make_plan):
        with pytest.raises(ConfigError, match=message):
            check(config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*COLOCATE],
        [*SEPARATE],
        [*SEPARATE, f"{ROLES}.hybrid_engine=False"],
        # Four rows are enough for the four data-parallel ranks that 16 GPUs have with TP 2 x PP 2.
        [*MEGATRON, *SPLIT, *FOUR_ROWS, *SIXTEEN],
        [
            *(*FOUR_ROWS, *SIXTEEN, "attention=flash_attention_2"),
            f"{ROLES}.actor.fsdp_config.ulysses_sequence_parallel_size=4",
        ],
        ["attention=flash_attention_2", f"{ROLES}.actor.ulysses_sequence_parallel_size=2"],
        [f"{ROLES}.model.exclude_modules=null"],  # without an adapter it says nothing
        ["embedrl.embedder.strategy=fsdp"],
        [*LORA],
        [*TRAINED, "embedrl.embedder.train.rollouts=all", "embedrl.embedder.n_gpus_per_node=65"],
        ["embedrl.embedder.backend=server", "embedrl.embedder.server.limit=8"],
        ["embedrl.embedder.server.limit=1"],
        ["data.val_batch_size=null", "data.validation_shuffle=True"],
        ["algorithm.adv_estimator=reinforce_plus_plus", f"{ROLES}.rollout.n=1"],
        [
            *(*CPU, "trainer.n_gpus_per_node=2", f"{ROLES}.rollout.tensor_model_parallel_size=2"),
            f"{ROLES}.rollout.{EXECUTOR}=mp",
        ],
        [*CPU, *JUDGE],
    ],
)
def test_what_goes_together_passes_in_a_run_and_in_its_plan(overrides):
    config = run_config(*overrides)
    check_run_config(config)
    make_plan(config)


def test_an_adapter_leaves_out_the_vision_part_by_default_and_must():
    """verl's own validator would import vLLM for an adapter, so the plan is not asked."""
    key, adapter = f"{ROLES}.model.exclude_modules", f"{ROLES}.model.lora_rank=8"
    check_run_config(run_config(adapter))
    check_run_config(run_config(adapter, f"{key}='.*(visual|lm_head).*'"))
    for wrong in ("null", "visual", "'.*visual.blocks.*'", "'.*mlp.*'", "[visual]"):
        with pytest.raises(ConfigError, match=f"{key} must be a pattern that matches every module of the vision part"):
            check_run_config(run_config(adapter, f"{key}={wrong}"))


def test_the_numbers_of_a_step():
    plan = BatchPlan.of(run_config(*MEGATRON, *SPLIT, "trainer.nnodes=4"))
    assert (plan.pairs, plan.rows, plan.updates, plan.mini_rows, plan.data_parallel) == (32, 512, 2, 256, 8)


@pytest.mark.parametrize(
    ("found", "overrides", "message"),
    [
        ("qwen3_vl", [], "data.embedrl.family is qwen2_vl, but .* is a qwen3_vl"),
        ("qwen2_vl", [*MEGATRON, "data.embedrl.family=auto"], "Megatron engine can load .* is a qwen2_vl"),
        ("qwen2_vl", ["data.embedrl.family=auto"], None),
        ("qwen3_vl_moe", ["data.embedrl.family=qwen3_vl"], None),
        (None, [*MEGATRON, "data.embedrl.family=auto"], None),
    ],
)
def test_the_reasoner_is_of_the_named_family_and_one_that_the_engine_loads(found, overrides, message):
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_family(run_config(*overrides), found)


@pytest.fixture
def named(tmp_path):
    """Overrides that name files which are there."""
    for folder in ("reasoner", "embedder"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pairs.parquet").touch()
    return [
        *(f"data.{part}_files={tmp_path}/pairs.parquet" for part in ("train", "val")),
        f"{ROLES}.model.path={tmp_path}/reasoner",
        f"embedrl.embedder.path={tmp_path}/embedder",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_files=[gone.parquet]", "data.train_files: no such file or data set folder: gone.parquet"),
        ("data.val_files=[]", "data.val_files must name at least one parquet file"),
        ("data.media_root=/gone", "data.media_root: no such folder: /gone"),
        ("embedrl.embedder.train.anchor_files=[gone.parquet]", "embedrl.embedder.train.anchor_files: no such file"),
        ("embedrl.embedder.path=/gone", "embedrl.embedder.path: no such folder: /gone"),
        (f"{ROLES}.model.path='a[1]'", r"actor_rollout_ref.model.path: vLLM reads .* as a pattern; rename it: a\[1\]"),
        (f"{ROLES}.model.path='a*'", "as a pattern"),
        (f"{ROLES}.model.path='b?'", "as a pattern"),
        ("embedrl.embedder.path=owner/name", None),  # of the hub
        ("data.train_files=s3://bucket/pairs.parquet", None),
    ],
)
def test_a_file_that_is_not_there_is_named_with_its_key(named, override, message):
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_files(run_config(*named, override))


def test_all_that_is_missing_is_named_at_once(named):
    missing = ["data.media_root=/gone", f"{ROLES}.model.path=/models/gone", *JUDGE]
    with pytest.raises(ConfigError, match=r"/gone; .*model.path: .*; reward.reward_model.model_path: no such folder"):
        check_files(run_config(*named, *missing))


@pytest.mark.parametrize(
    ("family", "video", "refused"), [("qwen2_5_vl", "p7", True), ("qwen2_5_vl", None, False), ("qwen3_vl", "p7", False)]
)
def test_videos_that_megatron_misplaces_are_refused(family, video, refused):
    data = SimpleNamespace(family=family, first_video=video)
    with pytest.raises(ConfigError, match="p7 has one") if refused else nullcontext():
        refuse_videos_that_megatron_misplaces(run_config(*MEGATRON), data)
    refuse_videos_that_megatron_misplaces(run_config(), data)


@pytest.mark.parametrize(
    ("steps", "epochs", "last", "said"),
    [(None, 3, 30, False), (12, 3, 12, False), (30, 3, 30, False), (31, 3, 30, True)],
)
def test_a_run_ends_at_the_step_that_its_epochs_allow(steps, epochs, last, said, caplog):
    """verl makes the last checkpoint and validation at that step alone."""
    run = SimpleNamespace(total_training_steps=steps, total_epochs=epochs)
    assert last_step(run, 10) == last
    assert ("step 30 is the last one" in caplog.text) is said


def test_data_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="training data must make a step; 0 an epoch"):
        last_step(SimpleNamespace(total_training_steps=2, total_epochs=3), 0)


def test_a_checkpoint_of_a_later_step_than_the_last_is_refused(tmp_path):
    check_resumed_step(tmp_path, 30, 30)
    with pytest.raises(ConfigError, match=r"is of step 40, and this run ends at step 30: raise trainer\.total"):
        check_resumed_step(tmp_path, 40, 30)


def test_a_mistyped_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "reasoner").mkdir(parents=True)
    for path in ("models/reasoner", "Qwen/Qwen3-VL-2B-Instruct", str(tmp_path / "models")):
        assert no_such_model(path) == "", path
    for path in ("models/resoner", "reasoner", "./some/model", "~/gone", "/gone", "a/b/c", "owner/"):
        assert no_such_model(path).startswith(f"no such folder: {path} (name a folder, or a hub id"), path
