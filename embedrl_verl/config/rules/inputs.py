# SPDX-License-Identifier: Apache-2.0
"""What the settings of a run name is there and fits: files, the Reasoner's family, the data, a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config.batch import is_megatron
from embedrl_verl.config.rules.run import MEGATRON_TYPES, no_megatron
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import facts_of

logger = logging.getLogger(__name__)


def files_of(config: Any, key: str) -> list[str]:
    """The files that a key names, alone or as a list."""
    value = OmegaConf.select(config, key)
    return [value] if isinstance(value, str) else list(value or [])


def missing_files(named: Mapping[str, Sequence[str]], media_root: str | None) -> list[str]:
    """What is not there of the local files and folders that keys name, each with its key."""
    missing = [
        f"{key}: no such file or data set folder: {file}"
        for key, files in named.items()
        for file in files
        if "://" not in file and not Path(file).expanduser().exists()
    ]
    if media_root and not Path(media_root).expanduser().is_dir():
        missing.append(f"data.media_root: no such folder: {media_root}")
    return missing


def check_files(config: Any) -> None:
    """Check that every local file and folder a run names is there. Hub ids (no such local path, one slash) pass.

    Raises:
        ConfigError: what is missing, each with its key.
    """
    named = {
        key: files_of(config, key)
        for key in ("data.train_files", "data.val_files", "embedrl.embedder.train.anchor_files")
    }
    problems = [
        f"{key} must name at least one parquet file of pair records; got none"
        for key in ("data.train_files", "data.val_files")
        if not named[key]
    ]
    problems += missing_files(named, config.data.get("media_root"))
    models = ["actor_rollout_ref.model.path", "embedrl.embedder.path"]
    models += ["reward.reward_model.model_path"] if config.reward.reward_model.enable else []
    for key in models:
        value = str(OmegaConf.select(config, key))
        is_hub_id = value.count("/") == 1 and not value.startswith((".", "/", "~"))
        if set("[]*?") & set(value):
            problems.append(f"{key}: vLLM reads [, ], * and ? in a model's path as a pattern; rename it: {value}")
        elif not is_hub_id and "://" not in value and not Path(value).expanduser().is_dir():
            problems.append(f"{key}: no such folder: {value}")
    function = str(config.reward.custom_reward_function.path)
    if not function.startswith("pkg://") and not Path(function.removeprefix("file://")).is_file():
        problems.append(f"reward.custom_reward_function.path: no such file: {function}")
    if problems:
        raise ConfigError("; ".join(problems))


def check_family(config: Any, found: str | None) -> None:
    """Check the model type that the Reasoner's folder gives (None: no folder here) against the settings.

    Raises:
        ConfigError: another family than the one named, or one that verl's Megatron engine cannot load.
    """
    named = MediaConfig.from_config(config.data).family
    if found is None:
        return
    if named != "auto" and found.removesuffix("_moe") != named:
        raise ConfigError(
            f"data.embedrl.family is {named}, but {config.actor_rollout_ref.model.path} is a {found}. Use the recipe "
            "of that family"
        )
    if is_megatron(config) and found not in MEGATRON_TYPES:
        raise ConfigError(no_megatron(found))


def refuse_videos_that_megatron_misplaces(config: Any, dataset: Any) -> None:
    """Refuse, under Megatron, videos whose positions count seconds (Qwen2.5-VL).

    Megatron-Bridge 0.5 computes the positions itself, without the frame rate, and they are wrong.

    Args:
        dataset: a `TCoTDataset`.

    Raises:
        ConfigError: the actor is such a model and the data have a video.
    """
    if not is_megatron(config) or facts_of(dataset.family).clip_time != "seconds" or dataset.first_video is None:
        return
    raise ConfigError(
        "actor_rollout_ref.actor.strategy=megatron places the frames of this family's videos wrongly, and "
        f"{dataset.first_video} has one. Use the FSDP recipe of that family, or data without videos"
    )


def last_step(run: Any, steps_per_epoch: int) -> int:
    """The last step of a run (section `trainer`), for which verl makes a checkpoint and a validation."""
    possible, wanted = steps_per_epoch * int(run.total_epochs), run.total_training_steps
    if wanted is None:
        return possible
    if wanted > possible:
        logger.warning(
            "EG-RL: step %d is the last one: trainer.total_epochs=%d has no more (trainer.total_training_steps=%d)",
            possible,
            run.total_epochs,
            wanted,
        )
    return min(int(wanted), possible)


def check_resumed_step(folder: Path, step: int, last: int) -> None:
    """A resumed run has steps to do, or has just done its last.

    Raises:
        ConfigError: the checkpoint is of a later step than the run's last one.
    """
    if step > last:
        raise ConfigError(
            f"{folder} is of step {step}, and this run ends at step {last}: raise trainer.total_training_steps (or "
            "trainer.total_epochs), or start a shorter run in another trainer.default_local_dir"
        )
