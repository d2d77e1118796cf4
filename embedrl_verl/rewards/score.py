# SPDX-License-Identifier: Apache-2.0
"""From terms to scores: R_i = alpha F_i + beta J_i + gamma O_i over the known terms (paper eq. 5), and the call of a
reward function with what it may return.

A reward function is `compute_score(batch, **reward_kwargs)`, plain or async; it returns a mapping of (N,) numbers in
row order with "score", NaN = unknown.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.rewards.batch import RewardBatch

# Defaults of the paper (eq. 5, supplement B.2).
ALPHA, BETA, GAMMA = 0.05, 0.8, 0.2
VERLS_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


@torch.no_grad()
def total_reward(
    format: Tensor,
    process: Tensor | None,
    outcome: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    """The weighted sum of (N,) float terms, where NaN = unknown adds nothing. `process` None: there is no such term.

    A term of weight 0 is no part of the reward, known or not. The result has the terms' common dtype and is NaN where
    every term with a weight is unknown.

    Raises:
        ValueError: shapes differ, a weight is negative or not finite, or all are 0.
    """
    process = torch.full_like(outcome, torch.nan) if process is None else process
    if not format.shape == process.shape == outcome.shape:
        raise ValueError(
            "format, process and outcome must have one shape; got "
            f"{tuple(format.shape)}, {tuple(process.shape)}, {tuple(outcome.shape)}"
        )
    for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_number(name, weight)
    if alpha == beta == gamma == 0:
        raise ValueError("at least one of alpha, beta and gamma must be positive; got 0 for all")
    total = torch.zeros(format.shape, dtype=torch.float64, device=outcome.device)
    known = torch.zeros(format.shape, dtype=torch.bool, device=outcome.device)
    for weight, term in ((alpha, format), (beta, process), (gamma, outcome)):
        if weight > 0:
            total += (weight * term.double()).nan_to_num(nan=0.0)
            known |= ~term.isnan()
    dtype = torch.promote_types(torch.promote_types(format.dtype, process.dtype), outcome.dtype)
    return total.masked_fill_(~known, torch.nan).to(dtype)


def row_scores(batch: RewardBatch, format: Tensor, process: Tensor | None, outcome: Tensor, **weights: float) -> Tensor:
    """(N,) float32 `total_reward` of a batch's rows.

    A row without embedding is unknown as a whole (NaN), and so is a row that the judge could not answer while it
    answered others of its group: their rewards have a term more. Where a whole group has a term unknown (a silent
    judge, a pair without partner) its rows are compared by the others.
    """
    unknown = ~batch.valid
    if process is not None:
        unknown = unknown | partly_known(process, batch.groups())
    return total_reward(format, process, outcome, **weights).masked_fill(unknown, torch.nan)


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
        raise ValueError(f"{name} must be a finite number of at least {least}; got {value!r}")


# ---------------------------------------------------------------------- the call


def call_reward_function(function: Callable[..., Any], batch: RewardBatch, where: str) -> dict[str, Tensor]:
    """Call a reward function on a batch of N rows and check what it returns.

    Args:
        function: takes the batch, its other arguments bound; may be async.
        where: what to call the function in messages, "FILE:function".

    Returns:
        "score" (N,) float32, NaN where unknown, and every other part that the function reports, each (N,) float32.

    Raises:
        ConfigError: verl's own signature, an unknown key of reward_kwargs, an error of the function's own (with the
            line), no "score", a wrong shape, no numbers, or an infinite value. Errors of this package are raised as
            they are.
    """
    raw, kwargs = _unbound(function)
    parameters = inspect.signature(raw).parameters
    if len(parameters.keys() & set(VERLS_ARGUMENTS)) > 1:
        raise ConfigError(
            f"{where} must be compute_score(batch, **reward_kwargs), called once with all rows of a batch, and return "
            f"a mapping with 'score', a number a row; got verl's signature for single rows ({', '.join(parameters)}). "
            "docs/rewards.md shows what a batch has"
        )
    unknown = sorted(kwargs.keys() - parameters.keys())
    if unknown and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
        keys = ", ".join(name for name in parameters if name != "batch") or "none"
        raise ConfigError(f"{where}: reward_kwargs has no key {', '.join(unknown)}; its keys are {keys}")
    try:
        parts = function(batch)
        if inspect.isawaitable(parts):
            parts = asyncio.run(_awaited(parts))
    except EmbedRLError:
        raise
    except (Exception, SystemExit) as error:
        file = raw.__code__.co_filename if hasattr(raw, "__code__") else ""
        raise ConfigError(f"{where} failed{where_raised(error, file)}") from error
    if not isinstance(parts, Mapping) or "score" not in parts:
        got = f"the keys {', '.join(map(str, parts)) or 'none'}" if isinstance(parts, Mapping) else type(parts).__name__
        raise ConfigError(f"{where} must return a mapping with the key 'score'; got {got}")
    return {str(name): _checked(value, f"{where}: part {name!r}", len(batch)) for name, value in parts.items()}


def refuse_all_unknown(score: Tensor, where: str, what: str) -> None:
    """ConfigError for a reward function (named `where`) that gives none of the rows of `what` a score."""
    if score.isnan().all():
        raise ConfigError(
            f"{where} must give rows a score; all {len(score)} of {what} are NaN, which means unknown, so it would "
            "train on nothing. Look for a division by 0, or a mean of nothing, in it"
        )


def _unbound(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function without its bound arguments, and those by name, also of verl's `partial(call, function, kwargs)`."""
    kwargs: dict[str, Any] = {}
    while isinstance(function, partial):
        kwargs |= function.keywords
        for bound in function.args:
            kwargs |= bound if isinstance(bound, Mapping) else {}
        function = next((bound for bound in function.args if callable(bound)), function.func)
    return function, kwargs


async def _awaited(parts: Any) -> Any:
    return await parts


def _checked(value: Any, what: str, rows: int) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} must be one number per row; got {type(value).__name__} ({error})") from error
    if tensor.shape != (rows,):
        raise ConfigError(f"{what} must have one value per row, shape ({rows},); got {tuple(tensor.shape)}")
    if torch.isinf(tensor).any():
        raise ConfigError(f"{what} has an infinite value; use NaN for an unknown row")
    return tensor


def where_raised(error: BaseException, path: str) -> str:
    """ " in line n: error", n being where it left the file; without the line if it was never in it."""
    if isinstance(error, SyntaxError):
        return f": SyntaxError in line {error.lineno}: {error.msg}"
    file = Path(path).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file]
    return f"{f' in line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"
