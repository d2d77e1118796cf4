# SPDX-License-Identifier: Apache-2.0
"""Our own sections: every key checked, none ignored, each default in one place."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, replace

import pytest

from embedrl_verl.config.schema import (
    ContrastiveConfig,
    EmbedderConfig,
    EmbedRLConfig,
    JudgeConfig,
    MediaConfig,
    SentenceConfig,
    Stage1DataConfig,
    parse_embedrl_section,
    yaml_of,
)
from embedrl_verl.errors import ConfigError

OURS = {
    EmbedRLConfig: (yaml_of("egrl_trainer")["embedrl"], {"embedder": {"path": "x"}}),
    MediaConfig: (yaml_of("egrl_trainer")["data"]["embedrl"], {}),
    ContrastiveConfig: (yaml_of("embedder_trainer")["contrastive"], {"out": "x"}),
    Stage1DataConfig: (
        {key: value for key, value in yaml_of("embedder_trainer")["data"].items() if key != "embedrl"},
        {"train_files": ["x"]},
    ),
}


@pytest.mark.parametrize("section", OURS)
def test_a_section_has_the_keys_and_the_defaults_of_the_yaml_and_none_of_its_own(section):
    written, given = OURS[section]
    expected = json.loads(json.dumps(written))
    for key, value in given.items():
        expected[key] = {**expected[key], **value} if isinstance(value, dict) else value
    assert json.loads(json.dumps(asdict(section(**given)))) == expected
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(section))


def of_embedder(**values):
    return {"embedder": {"path": "x", **values}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "embedrl.embedder.path must be a Hugging Face folder or hub id (set EMBEDDER_PATH); got None"),
        (of_embedder(path=""), "embedrl.embedder.path must be a Hugging Face folder"),
        ({**of_embedder(), "rewards": {}}, "embedrl has no key rewards; its keys are embedder, evidence, reward"),
        (of_embedder(profil="auto"), "embedrl.embedder has no key profil; its keys are"),
        (of_embedder(train={"enabled": True}), "embedrl.embedder.train has no key enabled"),
        ({**of_embedder(), "evidence": 3}, "embedrl.evidence must be a section with keys; got 3"),
        (of_embedder(dtype="fp8"), "embedrl.embedder.dtype must be 'bfloat16' or 'float32'; got 'fp8'"),
        (of_embedder(offload="yes"), "embedrl.embedder.offload must be True or False; got 'yes'"),
        (of_embedder(max_tokens_per_gpu=True), "max_tokens_per_gpu must be a valid integer; got True"),
        (of_embedder(max_text_tokens="480"), "max_text_tokens must be a valid integer; got '480'"),
        (of_embedder(nnodes=0), "embedrl.embedder.nnodes must be greater than or equal to 1; got 0"),
        (of_embedder(image_max_tokens=4), "image_max_tokens must be at least image_min_tokens (128); got 4"),
        (of_embedder(frame_min_tokens=301), "frame_max_tokens must be at least frame_min_tokens (301); got 300"),
        (of_embedder(tensor_model_parallel_size=2), "must be 1 without strategy=megatron; got 2"),
        (of_embedder(pipeline_model_parallel_size=2), "must be 1 without strategy=megatron; got 2"),
        (of_embedder(strategy="megatron", dtype="float32"), "must be bfloat16 with strategy=megatron"),
        (of_embedder(strategy="megatron", train={"enable": True, "ema_decay": 0.9}), "keeps no average"),
        (of_embedder(backend="server", train={"enable": True}), "backend must be worker with train.enable=True"),
        (of_embedder(server={"extra_args": ["max"]}), "extra_args must be a list of --option=value; got ('max',)"),
        (of_embedder(sentence={"n_gpus": False}), "sentence.n_gpus must be a valid integer; got False"),
        (of_embedder(train={"rollouts": "worst"}), "must be 'best', 'random' or 'all'; got 'worst'"),
        (of_embedder(train={"ema_decay": 1.0}), "train.ema_decay must be less than 1; got 1.0"),
        (of_embedder(train={"lr": 0}), "train.lr must be greater than 0; got 0"),
        (of_embedder(train={"anchor_files": "a"}), "train.anchor_files must be a list; got 'a'"),
        (of_embedder(train={"matryoshka_dims": [0]}), "train.matryoshka_dims.0 must be greater than or equal to 1"),
        (of_embedder(train={"lora_rank": 8}), "train.lora_alpha must be positive with a lora_rank; got 0"),
        (of_embedder(train={"lora_adapter_path": "a"}), "train.lora_rank must be the adapter's rank, with a path"),
        ({**of_embedder(), "reward": {"max_failed_share": 1}}, "reward.max_failed_share must be less than 1; got 1"),
        ({**of_embedder(), "judge": {"max_unknown_share": 2}}, "must be less than or equal to 1; got 2"),
        ({**of_embedder(), "judge": {"temperature": float("inf")}}, "judge.temperature must be a finite number"),
        ({**of_embedder(), "judge": {"extra_body": {"model": "m"}}}, "judge.extra_body must be without model, mess"),
        ({**of_embedder(), "judge": {"model": " "}}, "judge.model must be a name, or null to ask the server"),
        ({**of_embedder(), "rollout": {"min_probs_correlation": -0.1}}, "must be greater than or equal to 0; got -0.1"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_rule(section, message):
    with pytest.raises(ConfigError) as caught:
        parse_embedrl_section(section)
    assert message in str(caught.value)


def test_a_family_is_auto_or_a_model_type_that_is_known():
    assert MediaConfig.from_config({"embedrl": {"family": "qwen3_vl_moe"}}).family == "qwen3_vl_moe"
    assert MediaConfig.from_config({}) == MediaConfig()
    with pytest.raises(ConfigError, match=r"data\.embedrl\.family must be auto or one of qwen2_vl, .*; got 'bert'"):
        MediaConfig(family="bert")


def test_a_section_is_a_frozen_value_that_is_checked_again_when_it_is_changed():
    config = EmbedderConfig(path="x", sentence=SentenceConfig(n_gpus=0))
    assert pickle.loads(pickle.dumps(config)) == config == EmbedderConfig(path="x", sentence={"n_gpus": 0})
    assert replace(config, path="y").path == "y" and JudgeConfig(timeout_s=2).timeout_s == 2.0
    with pytest.raises(FrozenInstanceError):
        config.path = "y"
    with pytest.raises(ConfigError, match="nnodes"):
        replace(config, nnodes=0)


def test_the_schema_loads_no_engine():
    code = "import sys, embedrl_verl.config.schema; print({'torch', 'verl', 'ray', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "set()"
