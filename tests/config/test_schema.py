# SPDX-License-Identifier: Apache-2.0
"""The section `embedrl`: every key checked, none ignored."""

import pytest

from embedrl_verl.config.schema import EmbedRLConfig, parse_embedrl_section
from embedrl_verl.errors import ConfigError


def test_defaults_are_valid_once_a_path_is_given():
    config = parse_embedrl_section({"embedder": {"path": "models/emb"}})
    assert isinstance(config, EmbedRLConfig)
    assert config.reward.max_failed_share == 0.1
    assert config.embedder.max_text_tokens == 480


def test_the_yaml_defaults_are_the_dataclass_defaults():
    """Two places state defaults; this holds them together."""
    from importlib.resources import files

    from omegaconf import OmegaConf

    raw = OmegaConf.create(files("embedrl_verl.config").joinpath("egrl_trainer.yaml").read_text())
    section = OmegaConf.to_container(raw.embedrl)
    section["embedder"]["path"] = "x"
    assert parse_embedrl_section(section) == parse_embedrl_section({"embedder": {"path": "x"}})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"embedder": {"path": "x"}, "rewards": {}}, ["embedrl", "rewards", "evidence, judge, reward"]),
        ({"embedder": {"path": "x", "profil": "auto"}}, ["embedrl.embedder", "profil", "profile"]),
        ({"embedder": {}}, ["embedrl.embedder.path", "EMBEDDER_PATH"]),
        ({"embedder": {"path": "x", "dtype": "fp8"}}, ["dtype", "bfloat16", "fp8"]),
        ({"embedder": {"path": "x", "offload": "yes"}}, ["offload", "bool", "yes"]),
        ({"embedder": {"path": "x", "max_tokens_per_gpu": True}}, ["max_tokens_per_gpu", "True"]),
        ({"embedder": {"path": "x", "image_max_tokens": 4}}, ["image_max_tokens", "128", "4"]),
        ({"embedder": {"path": "x"}, "reward": {"max_failed_share": 1}}, ["max_failed_share", "1.0"]),
        ({"embedder": {"path": "x", "tensor_model_parallel_size": 2}}, ["1 without strategy=megatron", "2"]),
        ({"embedder": {"path": "x", "strategy": "megatron", "dtype": "float32"}}, ["bfloat16 with", "float32"]),
        (
            {"embedder": {"path": "x", "train": {"rollouts": "worst"}}},
            ["train.rollouts", "best, random or all", "worst"],
        ),
        ({"embedder": {"path": "x", "train": {"ema_decay": 1.0}}}, ["train.ema_decay", "below 1", "1.0"]),
        ({"embedder": {"path": "x", "train": {"anchor_files": "a"}}}, ["train.anchor_files", "list of str", "a"]),
        ({"embedder": {"path": "x", "train": {"enabled": True}}}, ["embedrl.embedder.train", "enabled", "enable"]),
        ({"embedder": {"path": "x"}, "judge": {"max_unknown_share": 2}}, ["judge.max_unknown_share", "0 and 1", "2"]),
        ({"embedder": {"path": "x"}, "judge": {"limit": 0}}, ["judge.limit", "1 or more", "0"]),
        ({"embedder": {"path": "x"}, "judge": {"urls": "http://a"}}, ["judge.urls", "list of str", "http://a"]),
        ({"embedder": {"path": "x"}, "evidence": 3}, ["embedrl.evidence", "section", "3"]),
        ({}, ["embedrl.embedder", "missing"]),
    ],
)
def test_a_wrong_key_or_value_is_named(section, words):
    with pytest.raises(ConfigError) as caught:
        parse_embedrl_section(section)
    for word in words:
        assert word in str(caught.value)
