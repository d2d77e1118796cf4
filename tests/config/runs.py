# SPDX-License-Identifier: Apache-2.0
"""Run configurations for tests: hydra composes each choice of groups once, the other overrides are put in by key."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from embedrl_verl.config.compose import compose

REQUIRED = ("embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl")
composed = cache(lambda *groups: compose(list(groups)))


def run_config(*overrides: str) -> Any:
    """A configuration as of these overrides, with what a run must name."""
    groups = [one for one in overrides if "." not in one.partition("=")[0]]
    config = copy.deepcopy(composed(*groups))
    for one in [*REQUIRED, *(one for one in overrides if one not in groups)]:
        parsed = OverridesParser.create().parse_override(one)
        if parsed.is_delete():
            above, _, key = parsed.key_or_group.rpartition(".")
            with open_dict(config):
                del OmegaConf.select(config, above)[key]
        else:
            OmegaConf.update(config, parsed.key_or_group, parsed.value(), force_add=one.startswith("+"))
    return config
