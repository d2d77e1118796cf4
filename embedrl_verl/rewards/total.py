# SPDX-License-Identifier: Apache-2.0
"""R_i = alpha F_i + beta J_i + gamma O_i over the known terms (paper eq. 5), and the weights of the ready-made rewards.

| preset | score | G in the source |
|---|---|---|
| paper | 0.05 F + 0.8 J + 0.2 A M | 8 |
| public_code | 0.05 F + 0.2 J max(M, 0) + 0.8 (A M / 2) | 4 |
| no_judge | 0.05 F + 0.8 A M | any |

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
from embedrl_verl.rewards.retrieval import ACCURACIES, Accuracy

# Defaults of the paper (eq. 5, supplement B.2).
ALPHA, BETA, GAMMA = 0.05, 0.8, 0.2


@torch.no_grad()
def total_reward(
    format: Tensor,
    process: Tensor,
    outcome: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    """The weighted sum of (N,) float terms, where NaN = unknown adds nothing.

    A term of weight 0 is no part of the reward, known or not. The result has the terms' common dtype and is NaN where
    every term with a weight is unknown.

    Raises:
        ValueError: shapes differ, or a weight is negative or not finite.
    """
    if not format.shape == process.shape == outcome.shape:
        raise ValueError(
            "format, process and outcome must have one shape; got "
            f"{tuple(format.shape)}, {tuple(process.shape)}, {tuple(outcome.shape)}"
        )
    total = torch.zeros(format.shape, dtype=torch.float64, device=outcome.device)
    known = torch.zeros(format.shape, dtype=torch.bool, device=outcome.device)
    for name, weight, term in (("alpha", alpha, format), ("beta", beta, process), ("gamma", gamma, outcome)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {weight}")
        if weight > 0:
            total += (weight * term.double()).nan_to_num(nan=0.0)
            known |= ~term.isnan()
    dtype = torch.promote_types(torch.promote_types(format.dtype, process.dtype), outcome.dtype)
    return total.masked_fill_(~known, torch.nan).to(dtype)


@torch.no_grad()
def partly_known(term: Tensor, group: Tensor) -> Tensor:
    """(N,) bool: the term is unknown here and known of another row of the group.

    Such a row cannot be compared with the others of its group: with the term left out, or filled with their mean, it
    would move their advantages.

    Args:
        term: (N,) float, NaN = unknown.
        group: (N,) int, rows of one prompt share an id.
    """
    known = ~term.isnan()
    return ~known & torch.isin(group, group[known])


def check_number(name: str, value: object, least: float = 0) -> None:
    """Refuse an argument of a reward function that is no finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ConfigError(f"reward_kwargs.{name} must be a finite number of at least {least}; got {value!r}")


@dataclass(frozen=True)
class RewardConfig:
    """Weights of format, process and outcome, and the two choices of `outcome_reward`."""

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
        """This preset with `reward.custom_reward_function.reward_kwargs` on top; ConfigError for unknown keys."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(f"reward_kwargs has no key {', '.join(unknown)}; its keys are {', '.join(known)}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


PAPER = RewardConfig()
PUBLIC_CODE = RewardConfig(beta=0.2, gamma=0.8)
NO_JUDGE = RewardConfig(beta=0.0, gamma=0.8)


def reward_terms(batch: RewardBatch, config: RewardConfig) -> dict[str, Tensor]:
    """F, A, M, O and with beta > 0 J of every row, by name: (N,) float32, NaN = unknown.

    Raises:
        ConfigError: beta > 0 and the batch has no judge.
    """
    if config.beta > 0 and batch.judge is None:
        raise ConfigError(
            f"beta > 0 needs a judge for the process reward; got beta={config.beta} and no judge. Use the reward "
            "no_judge (beta 0, gamma 0.8), set reward.custom_reward_function.reward_kwargs.beta=0, or start a judge"
        )
    accuracy, margin, outcome = batch.retrieval(temperature=config.temperature, accuracy=config.accuracy).reward
    terms = {"format": batch.format(), "accuracy": accuracy, "margin": margin, "outcome": outcome}
    if config.beta > 0:
        terms["process"] = batch.process()
    return terms


def row_scores(batch: RewardBatch, config: RewardConfig, terms: Mapping[str, Tensor]) -> Tensor:
    """(N,) float32 total of the terms "format", "outcome" and, with beta > 0, "process"; NaN as stated above."""
    process = terms.get("process", torch.full_like(terms["outcome"], torch.nan))
    unknown = ~batch.valid
    if config.beta > 0:
        unknown = unknown | partly_known(process, batch.groups())
    weights = {"alpha": config.alpha, "beta": config.beta, "gamma": config.gamma}
    return total_reward(terms["format"], process, terms["outcome"], **weights).masked_fill(unknown, torch.nan)
