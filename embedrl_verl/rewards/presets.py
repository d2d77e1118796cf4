# SPDX-License-Identifier: Apache-2.0
"""What the ready-made rewards in `functions` share: their weights and how they treat unknown terms (method section 4).

| preset | score | G in the source |
|---|---|---|
| paper | 0.05 F + 0.8 J + 0.2 A M | 8 |
| public_code | 0.05 F + 0.2 J max(M, 0) + 0.8 (A M / 2) | 4 |
| no_judge | 0.05 F + 0.8 A M | any |

`public_code` has the weights of the published code with its row errors mended; a right pick of the judge is never a
penalty (there, a negative margin made it one).

Unknown terms: a row without embedding is unknown as a whole (NaN), and so is a row that the judge could not answer
while it answered others of its group: their rewards have a term more. Where a whole group has a term unknown (a silent
judge, a pair without partner) its rows are compared by the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.rewards.outcome import ACCURACIES, Accuracy
from embedrl_verl.rewards.total import ALPHA, BETA, GAMMA, partly_known, total_reward


@dataclass(frozen=True)
class RewardConfig:
    """Weights of format (alpha), process (beta) and outcome (gamma), and the two choices of the outcome
    (`outcome_reward`).
    """

    alpha: float = ALPHA
    beta: float = BETA
    gamma: float = GAMMA
    accuracy: Accuracy = "share"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "temperature"):
            check_number(name, getattr(self, name))
        if self.temperature == 0:
            raise ConfigError("reward_kwargs.temperature must be positive; got 0")
        if self.alpha == self.beta == self.gamma == 0:
            raise ConfigError("at least one of reward_kwargs.alpha, beta and gamma must be positive; got 0 for all")
        if self.accuracy not in ACCURACIES:
            raise ConfigError(f"reward_kwargs.accuracy must be one of {', '.join(ACCURACIES)}; got {self.accuracy!r}")

    def override(self, changes: Mapping[str, object]) -> RewardConfig:
        """This preset with `reward.custom_reward_function.reward_kwargs` on top.

        Raises:
            ConfigError: an unknown key or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(f"reward_kwargs has no key {', '.join(unknown)}; its keys are {', '.join(known)}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def check_number(name: str, value: object, least: float = 0) -> None:
    """Refuse an argument of a reward function that is no finite number of at least `least`.

    Raises:
        ConfigError: what it says.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ConfigError(f"reward_kwargs.{name} must be a finite number of at least {least}; got {value!r}")


PAPER = RewardConfig()
PUBLIC_CODE = RewardConfig(beta=0.2, gamma=0.8)
NO_JUDGE = RewardConfig(beta=0.0, gamma=0.8)


def reward_parts(batch: RewardBatch, config: RewardConfig) -> dict[str, Tensor]:
    """The terms of every row: "format", "accuracy", "margin", "outcome", and with beta > 0 "process"; (N,) float32, NaN
    = unknown.

    Raises:
        ConfigError: beta > 0 and the batch has no judge.
    """
    if config.beta > 0 and batch.judge is None:
        raise ConfigError(
            f"beta > 0 needs a judge for the process reward; got beta={config.beta} and no judge. Use the reward "
            "no_judge (beta 0, gamma 0.8), set reward.custom_reward_function.reward_kwargs.beta=0, or start a judge"
        )
    accuracy, margin, outcome = batch.retrieval(temperature=config.temperature, accuracy=config.accuracy).reward
    parts = {"format": batch.format(), "accuracy": accuracy, "margin": margin, "outcome": outcome}
    if config.beta > 0:
        parts["process"] = batch.process()
    return parts


def row_scores(
    batch: RewardBatch, config: RewardConfig, format: Tensor, process: Tensor | None, outcome: Tensor
) -> Tensor:
    """(N,) float32 total reward of (N,) terms, with the unknown ones treated as the module says; process None = no such
    term.
    """
    if process is None:
        process = torch.full_like(outcome, torch.nan)
    unknown = ~batch.valid
    if config.beta > 0:
        unknown = unknown | partly_known(process, batch.groups())
    score = total_reward(format, process, outcome, alpha=config.alpha, beta=config.beta, gamma=config.gamma)
    return score.masked_fill(unknown, torch.nan)
