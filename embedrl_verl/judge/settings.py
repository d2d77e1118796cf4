# SPDX-License-Identifier: Apache-2.0
"""The section `embedrl.judge` as a judge. A run makes one before it starts anything, as a check."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge.judge import ListwiseJudge
from embedrl_verl.serving import PoolSettings, ServerPool

PLACEHOLDER = "http://judge"
"""Stands for the servers that verl has not started yet."""


def make_judge(config: JudgeConfig, urls: Sequence[str]) -> ListwiseJudge:
    """The judge of these servers."""
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(f"embedrl.judge.api_key_env names {config.api_key_env}, which is not set")
    limits = PoolSettings(
        limit=config.limit, timeout_s=config.timeout_s, retries=config.retries, backoff_s=config.backoff_s
    )
    try:
        pool = ServerPool(urls, limits, api_key=key, name="judge")
    except ConfigError as error:
        raise ConfigError(f"embedrl.judge.urls: {error}") from error
    return ListwiseJudge(pool, config)


def check_judge(config: JudgeConfig) -> None:
    """What can be checked before a server runs. The key is the trainer's, whose node may be another."""
    make_judge(replace(config, api_key_env=None), config.urls or (PLACEHOLDER,))
