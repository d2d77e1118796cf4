# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
    with pytest.raises(ConfigError, match=r"data\.embedrl has no key image_max_token; its keys are"):
        DataSettings.from_config({"embedrl": {"image_max_token": 5}})


def test_family_is_named_or_that_of_the_processor():
    class Qwen3VLProcessor:
        pass

    assert resolve_family("auto", Qwen3VLProcessor()) == "qwen3_vl"
    assert resolve_family("qwen2_vl", Qwen3VLProcessor()) == "qwen2_vl"
    with pytest.raises(ConfigError, match="got NoneType. Train a Qwen-VL model"):
        resolve_family("auto", None)
