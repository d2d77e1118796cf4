# SPDX-License-Identifier: Apache-2.0
"""The settings that a ready-made reward function's docstring shows work as pasted."""

import re
import shlex
from importlib import import_module

import pytest
from omegaconf import OmegaConf

from embedrl_verl.config.compose import compose
from embedrl_verl.rewards.functions import NEEDS


@pytest.mark.parametrize("name", NEEDS)
def test_settings_of_a_docstring_compose_and_are_keywords_of_the_function(name: str) -> None:
    module = import_module(f"embedrl_verl.rewards.functions.{name}")
    words = [word for line in re.findall(r"^ *'?\+?reward\..*$", module.__doc__, re.M) for word in shlex.split(line)]
    own = compose(words).reward.custom_reward_function
    assert words and set(own.reward_kwargs) <= set(module.compute_score.__kwdefaults__ or {})
    assert OmegaConf.to_container(own.reward_kwargs) or not any("reward_kwargs" in word for word in words)
