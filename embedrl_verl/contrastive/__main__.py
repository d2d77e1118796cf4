# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.contrastive [hydra overrides]`, or `torchrun ... -m embedrl_verl.contrastive ...`.

Exit codes as in `embedrl_verl.train`: 2 configuration, 3 data, 4 anything else that this package refuses.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from embedrl_verl.errors import ConfigError, EmbedRLError


def _alone() -> None:
    """Without torchrun: one rank."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")


def run(config: Any) -> None:
    """Train, or with DRY_RUN=1 only check the configuration and print the plan."""
    from embedrl_verl.contrastive.settings import load_stage1_config

    checked = load_stage1_config(config)
    if os.environ.get("DRY_RUN", "") not in ("", "0"):
        from embedrl_verl.contrastive.plan import describe_plan

        print(describe_plan(checked))
        return
    missing = checked.data.missing_files()
    if missing:
        raise ConfigError("; ".join(missing))
    _alone()
    from embedrl_verl.contrastive.trainer import ContrastiveTrainer

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    started = time.monotonic()
    trainer = ContrastiveTrainer(
        checked, rank=rank, world_size=size, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", size))
    )
    trainer.fit()
    if rank == 0:
        print(f"contrastive: done in {time.monotonic() - started:.0f} s", flush=True)


@hydra.main(config_path="../config", config_name="embedder_trainer", version_base=None)
def _main(config: Any) -> None:
    run(config)


def main() -> None:
    """Entry point: runs, and turns every refusal into one message and its exit code."""
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    sys.argv[1:1] = quiet
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    warnings.filterwarnings("ignore", message="(torchtitan|veomni|automodel|mindspeed) engine is not available")
    try:
        _main()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(ConfigError(str(error)), error)
    except EmbedRLError as error:
        _refuse(error, error)


def _refuse(own: EmbedRLError, error: BaseException) -> None:
    print(f"\n{type(own).__name__}: {own}", file=sys.stderr, flush=True)
    raise SystemExit(own.exit_code) from error


if __name__ == "__main__":
    main()
