# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.train [hydra overrides]`: EG-RL on stock verl.

The same run can be started by verl's own entry point, because the installed plugin registers the trainer mode there:

    python -m verl.trainer.main_ppo --config-dir <folder of egrl_trainer.yaml> --config-name egrl_trainer ...

This one adds what a person wants around it: everything checked before any process starts, the plan alone (DRY_RUN=1),
lines of its course (docs/logs.md), and errors as one message with an exit code (2 configuration, 3 data, 4 anything
else that this package refuses, 130 Ctrl-C).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from embedrl_verl.entry import is_dry_run, run_entry
from embedrl_verl.errors import PluginError
from embedrl_verl.platforms.forkserver import fork_ray_workers, fork_server


def run(config: Any) -> None:
    """Check everything that can be checked here, then hand over to verl's own `run_ppo`, whose errors are raised as
    themselves."""
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.utils.device import auto_set_device

    from embedrl_verl.plan.preflight import preflight
    from embedrl_verl.platforms.claims import FIRST_JOB, claim_weight_sockets
    from embedrl_verl.platforms.cluster import (
        OnThisNode,
        check_home,
        join_cluster,
        joins_a_cluster,
        make_paths_absolute,
    )
    from embedrl_verl.platforms.ray_cpus import check_ray_cpus
    from embedrl_verl.progress import loggers, metrics_file, progress_line

    mode = config.trainer.v1.trainer_mode
    if not _is_registered(mode):
        raise PluginError(
            f"trainer mode {mode!r} is not registered in verl, so the plugin is not loaded "
            f"(VERL_USE_EXTERNAL_PLUGINS={os.environ.get('VERL_USE_EXTERNAL_PLUGINS', 'auto')}). "
            "Install the package (pip install -e .) and let verl load plugins; `embedrl doctor` says more"
        )
    auto_set_device(config)
    make_paths_absolute(config)
    preflight(config, starts=True)
    check_home()
    join_cluster(config)
    check_ray_cpus(config)
    fork_ray_workers(config)
    if not joins_a_cluster(config):
        claim_weight_sockets(FIRST_JOB).close()  # another run shows before Ray starts; the trainer claims them for good
    # Ray warns of its default, a token for every cluster, at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    metrics = metrics_file(config)
    try:
        with progress_line(metrics, each_step="console" in loggers(config)):
            run_ppo(config, task_runner_class=OnThisNode(TaskRunnerV1))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_where(config, metrics)) from None


def _where(config: Any, metrics: Path | None) -> str:
    """Where an interrupted run stands."""
    from embedrl_verl.export.checkpoint import last_complete_step
    from embedrl_verl.progress import stage_path

    last = last_complete_step(Path(config.trainer.default_local_dir))
    doing = stage_path(metrics).read_text() if metrics is not None else "training"
    return f"{doing}; {'no checkpoint yet' if last is None else f'last checkpoint: step {last}'}"


def _is_registered(mode: str) -> bool:
    """Whether verl knows a trainer mode. Its register is asked for modes of others only: it is in the training stack,
    which this process needs for nothing else and imports for many seconds."""
    plugin = sys.modules.get("embedrl_verl.platforms.plugin")
    if plugin is not None and mode in plugin.TRAINER_MODES:
        return True
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return mode in TRAINER_REGISTRY


def _main(config: Any) -> None:
    if is_dry_run():
        from embedrl_verl.plan import print_plan

        print_plan(config)
    else:
        run(config)


def main() -> None:
    """Entry point: runs, and turns every refusal into one message and its exit code."""
    with contextlib.nullcontext() if is_dry_run() else fork_server():
        run_entry(_main, "egrl_trainer")


if __name__ == "__main__":
    main()
