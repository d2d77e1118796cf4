# SPDX-License-Identifier: Apache-2.0

import pytest
from omegaconf import OmegaConf

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.settings import DataSettings, resolve_family
from embedrl_verl.errors import ConfigError


def test_settings_come_from_verls_data_section():
    config = OmegaConf.create({"media_root": "m", "embedrl": {"family": "qwen3_vl", "image_max_tokens": 500}})
    settings = DataSettings.from_config(config)
    assert settings == DataSettings(family="qwen3_vl", image_max_tokens=500)
    assert settings.limits(32) == MediaLimits(32, 128, 500, 128, 300, 8)
    assert DataSettings.from_config({}) == DataSettings()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"image_max_token": 5}, r"unknown key data\.embedrl\.image_max_token; known are family, prompt_style"),
        ({"image_max_tokens": "768"}, r"data\.embedrl\.image_max_tokens must be of type int; got '768'"),
        ({"max_frames": True}, r"data\.embedrl\.max_frames must be of type int; got True"),
        ({"image_max_tokens": 100}, "image tokens must satisfy 1 <= minimum <= maximum; got 128 and 100"),
    ],
)
def test_unknown_and_impossible_values_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings.from_config({"embedrl": section})


def test_family_is_named_or_that_of_the_processor():
    class Qwen3VLProcessor:
        pass

    assert resolve_family("auto", Qwen3VLProcessor()) == "qwen3_vl"
    assert resolve_family("qwen2_vl", Qwen3VLProcessor()) == "qwen2_vl"
    with pytest.raises(ConfigError, match="got NoneType. Train a Qwen-VL model"):
        resolve_family("auto", None)
