# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run from hydra overrides, without hydra's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedrl_verl.errors import ConfigError


def compose(overrides: Sequence[str], config_name: str = "egrl_trainer") -> Any:
    """The run's configuration (DictConfig) for hydra overrides as on a command line.

    Raises:
        ConfigError: hydra cannot compose it: an unknown key, group or file, or an override that cannot be parsed.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("embedrl_verl.config", version_base=None):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reasons: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            text = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            if text not in reasons:
                reasons.append(text)
            cause = cause.__cause__
        raise ConfigError(f"the configuration cannot be composed: {'; '.join(reasons)}") from error
