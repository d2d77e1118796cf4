# SPDX-License-Identifier: Apache-2.0
"""What a stage 1 run will do, from its configuration and data; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from embedrl_verl.contrastive.rows import describe_pairs, read_training_pairs, video_sources
from embedrl_verl.contrastive.sampler import SubBatchPlan
from embedrl_verl.contrastive.settings import Stage1Config
from embedrl_verl.data.inspection import LocatedPair


def plan_of(config: Stage1Config, pairs: Sequence[LocatedPair]) -> SubBatchPlan:
    """The batches of a run over these pairs.

    Raises:
        ConfigError: as `SubBatchPlan`.
    """
    run = config.contrastive
    return SubBatchPlan(
        [pair.record.data_source for pair in pairs],
        batch_pairs=run.batch_pairs,
        sub_batch_pairs=run.sub_batch_pairs,
        weights=run.source_weights,
        video_sources=video_sources(pairs),
        max_video_sub_batches=run.max_video_sub_batches,
        raw_share=run.raw_share if config.data.tcot else 0.0,
        seed=run.seed,
    )


def describe_plan(config: Stage1Config) -> str:
    """The plan for a person; files that are not there are named instead of read.

    Raises:
        ConfigError, DataError: what would stop the run.
    """
    run, train = config.contrastive, config.embedder.train
    what = f"LoRA {train.lora_rank}/{train.lora_alpha}" if train.lora_rank else "all weights"
    lines = [
        f"model       {config.embedder.path} ({what}), {config.embedder.dtype}, profile {config.embedder.profile}",
        f"input       {'T-CoT and evidence' if config.data.tcot else 'raw'}"
        + (f", {run.raw_share:.0%} of the batches raw" if config.data.tcot and run.raw_share else ""),
        f"batch       {run.batch_pairs} pairs in sub-batches of {run.sub_batch_pairs}, one source each, at most "
        f"{run.max_video_sub_batches} of videos",
        f"objective   InfoNCE, temperature {train.temperature:g}, "
        + ("both directions" if train.symmetric else "query to target")
        + (f", also the first {list(train.matryoshka_dims)} dimensions" if train.matryoshka_dims else ""),
        f"optimizer   AdamW, lr {train.lr:g} {train.lr_scheduler}, {train.warmup_steps} warm-up updates",
        f"memory      micro-batches of {train.max_tokens_per_gpu} tokens a device, whatever the number of pairs",
        f"output      {run.out}",
    ]
    missing = config.data.missing_files()
    if missing:
        return "\n".join([*lines, "data        not all there: " + "; ".join(missing)])
    pairs = read_training_pairs(config.data.train_files, tcot=config.data.tcot)
    plan = plan_of(config, pairs)
    steps = run.total_steps or plan.steps(run.epochs)
    counts = ", ".join(f"{source} {count}" for source, count in describe_pairs(pairs).items())
    return "\n".join([*lines, f"data        {len(pairs)} pairs: {counts}", f"updates     {steps}"])
