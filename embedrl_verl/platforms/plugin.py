# SPDX-License-Identifier: Apache-2.0
"""What verl imports to load this plugin (entry point `verl.plugins`, name `embedrl`; verl imports it and never calls
it).

verl hides an exception of a plugin at debug level and goes on without it, so this module logs one line in every
process: a WARNING when it is in, an ERROR when it cannot be. It registers the platform `cpu`, and arranges that the
trainer modes of this package are registered as soon as verl's trainer package is imported, in those processes only:
they import the whole training stack, which the many other processes of a run need not pay for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from embedrl_verl import __version__
from embedrl_verl.errors import PluginError
from embedrl_verl.platforms.compat import VERL_VERSION, require_version

logger = logging.getLogger("embedrl_verl")

TRAINER_PACKAGE = "verl.trainer.ppo.v1"
# Modules whose import registers a trainer mode (verl.trainer.ppo.v1.register_trainer).
TRAINER_MODULES = ("embedrl_verl.platforms.trainer", "embedrl_verl.trainer.egrl", "embedrl_verl.trainer.modes_async")
# What they register.
TRAINER_MODES = ("plain_sync", "egrl_sync", "egrl_colocate_async", "egrl_separate_async")


def add_trainers(ending: str = "") -> None:
    """Registers the trainer modes, in a process that can start a run.

    Whichever of TRAINER_MODULES is imported first imports verl's trainer package, which comes here before that module
    has its classes: the others wait for its end.

    Args:
        ending: the one of TRAINER_MODULES that calls this as its last statement.
    """
    from embedrl_verl.platforms.patches import choose_master_ports_that_stay_free

    choose_master_ports_that_stay_free()
    if not any(name != ending and _is_beginning(name) for name in TRAINER_MODULES):
        for name in TRAINER_MODULES:
            importlib.import_module(name)


def _is_beginning(name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class _LoaderThenTrainers(importlib.abc.Loader):
    """Loads TRAINER_PACKAGE with its own loader, then our registrations; an error in either is the import's error."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        add_trainers()


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Meta path finder that wraps the loader of TRAINER_PACKAGE and finds nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRAINER_PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenTrainers(spec.loader)
        return spec


def register() -> None:
    """Registers everything once per process. Raises PluginError when the installed verl is not the supported one."""
    import verl

    try:
        require_version("verl", verl.__version__, VERL_VERSION, "embedrl-verl")
    except PluginError as error:
        logger.error("embedrl-verl %s is NOT loaded in verl: %s", __version__, error)
        raise
    from embedrl_verl.platforms import cpu  # its import registers the platform

    cpu.install_vllm_metadata()
    if not any(isinstance(finder, TrainerFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TrainerFinder())
    if TRAINER_PACKAGE in sys.modules:
        add_trainers()
    say_loaded()


def say_loaded() -> None:
    """The line of a process that has the plugin; a forked one says it of itself (platforms.forkserver)."""
    import verl

    platform = os.environ.get("VERL_PLATFORM", "") or "auto"
    print(f"embedrl-verl {__version__} is loaded in verl {verl.__version__} (platform {platform})", file=sys.stderr)


register()
