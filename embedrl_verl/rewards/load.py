# SPDX-License-Identifier: Apache-2.0
"""Loads a reward function by the names that `reward.custom_reward_function` takes, without verl."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.rewards.score import where_raised

SHIPPED = "embedrl_verl.rewards.functions"
_ADDED: list[Path] = []
"""Folders that `allow_helpers` has added to `sys.path`: of one file at most."""


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
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path} cannot be imported{where_raised(error, str(source_of(path)))}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise ConfigError(
            f"{path} must have a function {name}(batch, **reward_kwargs); it has {', '.join(there) or 'none'}. "
            "Name another one as FILE:NAME (a run: reward.custom_reward_function.name=NAME)"
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
        raise ConfigError(
            f"there is no reward function file {file}; name a file, or pkg://package.module "
            "(`embedrl reward list` has the ready-made ones)"
        )
    name = f"reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} must be a Python file (.py)")
    allow_helpers(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def allow_helpers(path: str) -> None:
    """Let the file of a reward function import modules that lie beside it. What is installed comes first; modules that
    an earlier call let in are forgotten, since they may be of another folder, or edited."""
    source = source_of(path)
    if isinstance(source, str):
        return
    folder = source.resolve().parent
    for name in {name for one in (folder, *_ADDED) for name in helpers_in(one)}:
        del sys.modules[name]
    for one in _ADDED:
        sys.path.remove(str(one))
    _ADDED[:] = [] if str(folder) in sys.path else [folder]
    sys.path.extend(map(str, _ADDED))


def helpers_in(folder: Path) -> dict[str, Path]:
    """Modules that have been imported from files of a folder (a resolved path), by name."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "." not in name}
    return {
        name: Path(file)
        for name, file in sorted(files.items())
        if file and name != "__main__" and Path(file).resolve().parent == folder
    }


def same_function(one: str, other: str) -> bool:
    """Whether two full names ("FILE:function") name one function: the same file, or the same pkg:// path."""

    def place(where: str) -> tuple[str | Path, str]:
        path, _, name = where.rpartition(":")
        source = source_of(path)
        if isinstance(source, str) and source.startswith(f"{SHIPPED}."):
            source = Path(__file__).parent / "functions" / f"{source.removeprefix(f'{SHIPPED}.')}.py"
        return source if isinstance(source, str) else source.resolve(), name

    return place(one) == place(other)
