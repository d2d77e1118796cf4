# SPDX-License-Identifier: Apache-2.0
"""The section `embedrl.judge` as a judge. A run makes one before it starts anything, as a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.judge.judge import ListwiseJudge
from embedrl_verl.serving import ServerPool

PLACEHOLDER = "http://judge"
"""Stands for the servers that verl has not started yet."""


def make_judge(config: JudgeConfig, urls: Sequence[str]) -> ListwiseJudge:
    """The judge of these servers."""
    return ListwiseJudge(ServerPool.from_config(config, urls, section="embedrl.judge", name="judge"), config)


def check_judge(config: JudgeConfig) -> None:
    """What can be checked before a server runs. The key is the trainer's, whose node may be another."""
    make_judge(replace(config, api_key_env=None), config.urls or (PLACEHOLDER,))
