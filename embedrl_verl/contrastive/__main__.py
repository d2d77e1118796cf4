# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.contrastive [hydra overrides]`, or `torchrun ... -m embedrl_verl.contrastive ...`.

Exit codes as in `embedrl_verl.train`: 2 configuration, 3 data, 4 anything else that this package refuses (torchrun
itself ends with 1 whatever its processes end with).
"""

from __future__ import annotations

import os
import time
from typing import Any

import hydra

from embedrl_verl.entry import run_entry
from embedrl_verl.errors import ConfigError


def _alone() -> None:
    """Without torchrun: one rank, whose store takes any free port (0), as nobody else has to find it."""
    if "WORLD_SIZE" in os.environ:
        return
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
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
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    run_entry(_main)


if __name__ == "__main__":
    main()
