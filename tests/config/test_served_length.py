# SPDX-License-Identifier: Apache-2.0
"""vLLM is asked to serve no longer sequences than a run has."""

from embedrl_verl.config.compose import bound_served_lengths, compose

GPU = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl"]


def lengths(*overrides):
    config = compose([*GPU, *overrides])
    bound_served_lengths(config)
    return config.actor_rollout_ref.rollout.max_model_len, config.reward.reward_model.rollout.max_model_len


def test_the_longest_sequence_is_the_prompt_and_the_response_and_what_is_set_stays():
    assert lengths() == (14336 + 2048, 28672 + 16)
    assert lengths("data.max_prompt_length=4096") == (4096 + 2048, 28672 + 16)
    assert lengths("reward.reward_model.rollout.max_model_len=512") == (14336 + 2048, 512)
    assert lengths("actor_rollout_ref.rollout.max_model_len=32768")[0] == 32768
