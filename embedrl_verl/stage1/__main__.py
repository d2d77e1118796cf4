# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.stage1 [hydra overrides]`, or `torchrun ... -m embedrl_verl.stage1 ...`.

DRY_RUN=1 checks configuration and data and prints the plan. Exit codes are those of `embedrl_verl.train`: 2
configuration, 3 data, 4 anything else that this package refuses, 130 Ctrl-C (torchrun itself always ends with 1).
"""

from __future__ import annotations

import os
import time
from typing import Any

from embedrl_verl.entry import run_entry
from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.settings import Stage1Config, load_stage1_config


def one_rank() -> None:
    """The environment of a run without torchrun; its store takes any free port (0), as nobody else has to find it."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")


def describe_plan(config: Stage1Config) -> str:
    """What a run will do, for a person; no model is loaded, and files that are not there are named instead of read."""
    from embedrl_verl.stage1.rows import count_by_source, read_training_pairs
    from embedrl_verl.stage1.sampler import plan_batches

    run, train = config.contrastive, config.embedder.train
    weights = f"LoRA {train.lora_rank}/{train.lora_alpha}" if train.lora_rank else "all weights"
    some_raw = f", {run.raw_share:.0%} of the batches raw" if config.data.tcot and run.raw_share else ""
    directions = "both directions" if train.symmetric else "query to target"
    cut = f", also the first {list(train.matryoshka_dims)} dimensions" if train.matryoshka_dims else ""
    lines = [
        f"model       {config.embedder.path} ({weights}), {config.embedder.dtype}, profile {config.embedder.profile}",
        f"input       {'T-CoT and evidence' if config.data.tcot else 'raw'}{some_raw}",
        f"batch       {run.batch_pairs} pairs in sub-batches of {run.sub_batch_pairs}, one source each, at most "
        f"{run.max_video_sub_batches} of videos",
        f"objective   InfoNCE, temperature {train.temperature:g}, {directions}{cut}",
        f"optimizer   AdamW, lr {train.lr:g} {train.lr_scheduler}, {train.warmup_steps} warm-up updates",
        f"memory      micro-batches of {train.max_tokens_per_gpu} tokens a device, whatever the number of pairs",
        f"output      {run.out}",
    ]
    if missing := config.missing_files():
        return "\n".join([*lines, "data        not all there: " + "; ".join(missing)])
    pairs = read_training_pairs(config.data.train_files, tcot=config.data.tcot)
    steps = run.total_steps or plan_batches(config, pairs).steps(run.epochs)
    counts = ", ".join(f"{source} {count}" for source, count in count_by_source(pairs).items())
    return "\n".join([*lines, f"data        {len(pairs)} pairs: {counts}", f"updates     {steps}"])


def run(config: Any) -> None:
    """Train, or describe the plan."""
    checked = load_stage1_config(config)
    if os.environ.get("DRY_RUN", "") not in ("", "0"):
        print(describe_plan(checked))
        return
    if missing := checked.missing_files():
        raise ConfigError("; ".join(missing))
    from embedrl_verl.stage1.trainer import ContrastiveTrainer

    if "WORLD_SIZE" not in os.environ:
        one_rank()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    started = time.monotonic()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    ContrastiveTrainer(checked, rank=rank, world_size=size, local_world_size=local).fit()
    if rank == 0:
        print(f"contrastive: done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    run_entry(run, "embedder_trainer")
