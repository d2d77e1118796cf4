# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: defaults in the YAML files, types in `schema`, what must fit together in `rules`."""

from __future__ import annotations

from typing import Any

from embedrl_verl.config.schema import EmbedRLConfig, parse_embedrl_section
from embedrl_verl.errors import ConfigError

__all__ = ["EmbedRLConfig", "load_embedrl_config", "parse_embedrl_section"]


def load_embedrl_config(config: Any) -> EmbedRLConfig:
    """The section `embedrl` of a whole run configuration (DictConfig), as `parse_embedrl_section`."""
    from omegaconf import OmegaConf

    if "embedrl" not in config:
        raise ConfigError(
            "the configuration has no section `embedrl`; compose it from embedrl_verl's egrl_trainer.yaml "
            "(python -m embedrl_verl.train, or --config-dir with its folder)"
        )
    plain = OmegaConf.to_container(config.embedrl, resolve=True)
    if not isinstance(plain, dict):
        raise ConfigError(f"embedrl must be a section with keys; got {plain!r}")
    return parse_embedrl_section({str(key): value for key, value in plain.items()})
