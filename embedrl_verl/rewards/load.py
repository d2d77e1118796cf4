# SPDX-License-Identifier: Apache-2.0
"""Loads a reward function by the names that `reward.custom_reward_function` takes, without verl."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.rewards.score import where_raised


def load_reward_function(spec: str) -> tuple[Callable[..., Any], str]:
    """A reward function and its full name, "FILE:function".

    Args:
        spec: what `reward.custom_reward_function.path` takes: a file, file://FILE or pkg://module; then ":name" for
            another function than `compute_score`.
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
        raise ConfigError(f"{path} cannot be imported{where_raised(error, str(source_of(path)))}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise ConfigError(
            f"{path} must have a function {name}(batch, **reward_kwargs); it has {', '.join(there) or 'none'}"
        )
    return function, f"{path}:{name}"


def source_of(path: str) -> Path | str:
    """The file of FILE or file://FILE, or the module's name of pkg://MODULE."""
    if path.startswith("pkg://"):
        return path.removeprefix("pkg://").replace("/", ".")
    return Path(path.removeprefix("file://"))


def _import(path: str) -> ModuleType:
    """The module of a path; like verl's loader, a file's module is not registered."""
    file = source_of(path)
    if isinstance(file, str):
        return importlib.import_module(file)
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
        source = source_of(path)
        return source if isinstance(source, str) else source.resolve(), name

    return place(one) == place(other)
