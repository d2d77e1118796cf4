# SPDX-License-Identifier: Apache-2.0
"""`training.json` beside a checkpoint of EG-RL: what `embedrl export` writes into the model card.

The step folder's record is about the Reasoner, the one in its folder `embedder` about a co-trained Embedder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.export.record import DataSource, TrainingRecord, write_record


def sources_of(pair_sources: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of each source, as the record says them."""
    return [{"source": source, "pairs": pairs} for source, pairs in sorted(Counter(pair_sources).items())]


def write_reasoner_record(
    step_folder: str,
    step: int,
    config: Any,
    embedrl: EmbedRLConfig,
    data: list[dict[str, Any]],
    scores: Mapping[str, Any],
) -> None:
    """The record of the Reasoner; `config` is the whole run's, `scores` those of the last validation."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    settings = {
        "embedder": embedrl.embedder.path,
        "embedder_trained": embedrl.embedder.train.enable,
        "reward_function": Path(str(config.reward.custom_reward_function.path)).name,
        "pairs_per_step": config.data.train_batch_size // 2,
        "rollouts": rollout.n,
        "temperature": rollout.temperature,
        "lr": actor.optim.lr,
        "kl_loss_coef": actor.kl_loss_coef,
        "clip_ratio": actor.clip_ratio,
        "max_prompt_length": config.data.max_prompt_length,
        "max_response_length": config.data.max_response_length,
        "seed": config.data.get("seed") or 0,
    }
    _write(Path(step_folder), "egrl", step, config.actor_rollout_ref.model.path, data, settings, scores)


def write_embedder_record_for_export(
    folder: str, step: int, embedrl: EmbedRLConfig, data: list[dict[str, Any]], scores: Mapping[str, Any]
) -> None:
    """The record of a co-trained Embedder."""
    train = asdict(embedrl.embedder.train)
    hidden = ("enable", "anchor_files", "lora_adapter_path", "gradient_checkpointing", "max_tokens_per_gpu")
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in train.items()}
    settings = {"inside": "EG-RL", **{name: value for name, value in settings.items() if name not in hidden}}
    _write(Path(folder), "embedder", step, str(embedrl.embedder.path), data, settings, scores)


def _write(
    folder: Path,
    stage: str,
    step: int,
    base_model: str,
    data: list[dict[str, Any]],
    settings: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> None:
    record = TrainingRecord(
        stage=stage,
        step=step,
        base_model=base_model,
        data=tuple(DataSource(**one) for one in data),
        settings=dict(settings),
        scores={name: float(value) for name, value in scores.items()},
    )
    write_record(folder, record)
