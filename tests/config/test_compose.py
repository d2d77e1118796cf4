# SPDX-License-Identifier: Apache-2.0
"""The composed configuration, and keys that follow from others."""

import pytest

from embedrl_verl.config.compose import bound_served_lengths, compose
from embedrl_verl.errors import ConfigError
from tests.config.runs import run_config


def lengths(*overrides):
    config = run_config(*overrides)
    bound_served_lengths(config)
    return config.actor_rollout_ref.rollout.max_model_len, config.reward.reward_model.rollout.max_model_len


def test_the_longest_sequence_served_is_the_prompt_and_the_response_and_what_is_set_stays():
    assert lengths() == (14336 + 2048, 28672 + 16)
    assert lengths("data.max_prompt_length=4096") == (4096 + 2048, 28672 + 16)
    assert lengths("reward.reward_model.rollout.max_model_len=512") == (14336 + 2048, 512)
    assert lengths("actor_rollout_ref.rollout.max_model_len=32768")[0] == 32768


@pytest.mark.parametrize("override", ["embedrl.embeder.path=x", "platform=tpu", "a b"])
def test_what_hydra_cannot_compose_is_one_message_of_ours(override):
    with pytest.raises(ConfigError, match="the configuration cannot be composed: "):
        compose([override])


def test_the_cpu_platform_has_one_process_for_a_server_and_an_engine_that_reaches_other_processes():
    config = run_config("platform=cpu")
    rollout, judge = config.actor_rollout_ref.rollout, config.reward.reward_model.rollout
    for section in (rollout, judge):
        assert section.engine_kwargs.vllm.distributed_executor_backend == "uni"
    # vLLM's CPU build goes back to one more process without it.
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ENABLE_V1_MULTIPROCESSING == "0"
    engine = rollout.checkpoint_engine
    assert (engine.backend, engine.custom_backend_module) == ("gloo", "embedrl_verl.platforms.cpu_checkpoint_engine")
    on_gpu = run_config().actor_rollout_ref.rollout.engine_kwargs.get("vllm", {})
    assert "distributed_executor_backend" not in on_gpu
