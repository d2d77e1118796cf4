# SPDX-License-Identifier: Apache-2.0
"""Loads a reward function and calls it: one place for what a function may return and how its mistakes are reported.

A reward function is `compute_score(batch, **reward_kwargs)`, plain or async; it returns a mapping of (N,) numbers in
row order with "score", NaN = unknown. verl loads it for a run (`reward.custom_reward_function`); `load_reward_function`
takes the same names without verl.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.rewards.batch import RewardBatch


def load_reward_function(spec: str) -> tuple[Callable[..., Any], str]:
    """A reward function and its full name, "FILE:function".

    Args:
        spec: what `reward.custom_reward_function.path` takes: a file, file://FILE or pkg://module; then ":name" for
            another function than `compute_score`.

    Raises:
        ConfigError: no such file or module, it cannot be imported (with the line), or it has no such function.
    """
    path, name = spec, "compute_score"
    head, colon, tail = spec.rpartition(":")
    if colon and tail.isidentifier() and not Path(spec).exists():
        path, name = head, tail
    try:
        module = _import(path)
    except EmbedRLError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported{_where(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise ConfigError(
            f"{path} must have a function {name}(batch, **reward_kwargs); it has {', '.join(there) or 'none'}"
        )
    return function, f"{path}:{name}"


def _import(path: str) -> ModuleType:
    """The module of a path; like verl's loader, a file's module is not registered."""
    if path.startswith("pkg://"):
        return importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    file = Path(path.removeprefix("file://"))
    if not file.is_file():
        raise ConfigError(f"there is no reward function file {file}; name a file, or pkg://package.module")
    name = f"reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_function(one: str, other: str) -> bool:
    """Whether two full names ("FILE:function") name one function: the same file, or the same pkg:// path."""

    def place(where: str) -> tuple[str | Path, str]:
        path, _, name = where.rpartition(":")
        is_package = path.startswith("pkg://")
        return path.replace("/", ".") if is_package else Path(path.removeprefix("file://")).resolve(), name

    return place(one) == place(other)


def call_reward_function(function: Callable[..., Any], batch: RewardBatch, where: str) -> dict[str, Tensor]:
    """Call a reward function on a batch of N rows and check what it returns.

    Args:
        function: takes the batch; may be async.
        where: what to call the function in messages, "FILE:function".

    Returns:
        "score" (N,) float32, NaN where unknown, and every other part that the function reports, each (N,) float32.

    Raises:
        ConfigError: it raised something itself (with the line), no "score", a wrong shape, no numbers, or an infinite
            value. Errors of this package are raised as they are.
    """
    try:
        parts = function(batch)
        if inspect.isawaitable(parts):
            parts = asyncio.run(_await(parts))
    except EmbedRLError:
        raise
    except Exception as error:
        raise ConfigError(f"{where} failed{_where(error, _file_of(function))}") from error
    if not isinstance(parts, Mapping) or "score" not in parts:
        got = f"the keys {', '.join(map(str, parts)) or 'none'}" if isinstance(parts, Mapping) else type(parts).__name__
        raise ConfigError(f"{where} must return a mapping with the key 'score'; got {got}")
    return {str(name): _checked(value, f"{where}: part {name!r}", len(batch)) for name, value in parts.items()}


async def _await(parts: Any) -> Any:
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


def _where(error: Exception, path: str) -> str:
    """ " in line n: error", n being where it left the file; without the line if it was never in it."""
    if isinstance(error, SyntaxError):
        return f": SyntaxError in line {error.lineno}: {error.msg}"
    file = Path(path.removeprefix("file://")).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file]
    return f"{f' in line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"


def _file_of(function: Callable[..., Any]) -> str:
    """The file of a function, also of one whose arguments verl has bound (`partial(call, function, kwargs)`)."""
    while isinstance(function, partial):
        function = next((bound for bound in function.args if callable(bound)), function.func)
    return str(function.__code__.co_filename) if hasattr(function, "__code__") else ""
