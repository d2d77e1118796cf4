# SPDX-License-Identifier: Apache-2.0
"""How a command that hydra configures ends: a refusal is one message and its exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from embedrl_verl.errors import ConfigError, EmbedRLError

INTERRUPTED = 130
"""Exit code of Ctrl-C, as a shell's."""


def is_dry_run() -> bool:
    """Whether the environment asks for the plan alone (DRY_RUN=1)."""
    return os.environ.get("DRY_RUN", "") not in ("", "0")


def run_entry(task: Callable[[Any], None], config_name: str) -> None:
    """Run a task on the configuration that hydra makes of a file in embedrl_verl/config and the command line.

    A refusal of this package or of hydra becomes one message and its exit code, and so does Ctrl-C (`INTERRUPTED`).
    """
    # hydra must neither change the working directory nor write a log folder, and must let errors through to us.
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    sys.argv[1:1] = quiet
    # verl warns of every engine whose library is missing; these are never used here.
    warnings.filterwarnings("ignore", message="(torchtitan|veomni|automodel|mindspeed) engine is not available")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    raised: list[BaseException] = []

    @hydra.main(config_path="config", config_name=config_name, version_base=None)
    def guarded(config: Any) -> None:
        try:
            task(config)
        except Exception as error:  # from hydra it would come with a line of all overrides
            raised.append(error)

    try:
        guarded()
        if raised:
            raise raised[0]
    except KeyboardInterrupt as stop:
        if "EMBEDRL_RECIPE" not in os.environ:  # which says it in its own words
            where = f" ({stop})" if str(stop) else ""
            print(f"\ninterrupted{where}; the same command goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        hydras = isinstance(error, (HydraException, OmegaConfBaseException))
        own = ConfigError(str(error)) if hydras else _own_error(error)
        if own is None:
            raise
        print(f"\n{type(own).__name__}: {own}", file=sys.stderr, flush=True)
        raise SystemExit(own.exit_code) from error


def _own_error(error: BaseException) -> EmbedRLError | None:
    """The error of this package inside what Ray raised, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, EmbedRLError):
            cause = getattr(seen, "cause", None)  # Ray raises a class that is both its own and the remote error's
            return cause if isinstance(cause, EmbedRLError) else seen
        seen = seen.__cause__
    return None
