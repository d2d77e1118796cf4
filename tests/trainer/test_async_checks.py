# SPDX-License-Identifier: Apache-2.0
"""A configuration that an asynchronous mode cannot run is one clear message before anything starts."""

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.config.rules import check_run_config
from embedrl_verl.errors import ConfigError
from embedrl_verl.plan import make_plan

COMMON = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl", "platform=cpu"]
COLOCATE = [*COMMON, "trainer.v1.trainer_mode=egrl_colocate_async"]
SEPARATE = [
    *COMMON,
    "trainer.v1.trainer_mode=egrl_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.rollout.nnodes=1",
]


@pytest.mark.parametrize("overrides", [COLOCATE, SEPARATE, [*SEPARATE, "actor_rollout_ref.hybrid_engine=False"]])
def test_the_defaults_fit_both_modes(overrides):
    make_plan(compose([*overrides, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*COMMON, "actor_rollout_ref.hybrid_engine=False"], "hybrid_engine must be True with trainer mode egrl_sync"),
        ([*COLOCATE, "actor_rollout_ref.hybrid_engine=False"], "hybrid_engine must be True"),
        ([*COLOCATE, "trainer.v1.sampler.max_off_policy_threshold=0"], "max_off_policy_threshold must be 1 or more"),
        ([*COLOCATE, "trainer.v1.sampler.max_off_policy_strategy=skip"], "must be drop or wait; got skip"),
        ([*COLOCATE, "trainer.v1.colocate_async.num_warmup_batches=-1"], "colocate_async.num_warmup_batches must be 0"),
        ([*COLOCATE, "skip.rollout_tq.enable=True"], "skip.rollout_tq.enable must be False"),
        ([*COLOCATE, "data.train_batch_size=63"], "must be even; got 63"),
        (
            [*SEPARATE, "trainer.v1.separate_async.parameter_sync_step=0"],
            "parameter_sync_step must be 1 or more; got 0",
        ),
        ([*SEPARATE, "trainer.v1.separate_async.parameter_sync_step=4"], r"must be .*parameter_sync_step \(4\) x"),
        (
            [*SEPARATE, "data.train_batch_size=6", "actor_rollout_ref.actor.ppo_mini_batch_size=3"],
            r"ppo_mini_batch_size \(3 prompts\) must be a multiple of the 2 prompts that stay together",
        ),
        (
            [*SEPARATE, "data.embedrl.pairs_together=32"],
            r"ppo_mini_batch_size \(32 prompts\) must be a multiple of the 64 prompts",
        ),
        ([*SEPARATE, "actor_rollout_ref.rollout.nnodes=0"], "must be a multiple of one replica's 1; got 0 x 1"),
        ([*SEPARATE, "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"], "must reach other processes"),
        (
            [*SEPARATE, "reward.reward_model.enable=True", "reward.reward_model.model_path=/models/judge"],
            "judge that verl serves must have devices of its own",
        ),
        (
            [*SEPARATE, "embedrl.embedder.train.enable=True", "embedrl.embedder.n_gpus_per_node=40"],
            "gives at most 32 of a batch",
        ),
    ],
)
def test_what_cannot_work_is_named_with_its_key(overrides, message):
    config = compose(overrides)
    with pytest.raises(ConfigError, match=message):
        check_run_config(config)


def test_the_cpu_platform_names_an_engine_that_reaches_other_processes():
    engine = compose(SEPARATE).actor_rollout_ref.rollout.checkpoint_engine
    assert (engine.backend, engine.custom_backend_module) == ("gloo", "embedrl_verl.platforms.cpu_checkpoint_engine")
