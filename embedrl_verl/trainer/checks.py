# SPDX-License-Identifier: Apache-2.0
"""Checks of a whole run configuration that need no process to be started.

Called by the trainer, by `python -m embedrl_verl.train` and by dry runs, so that a mistake is one clear line.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import facts_of
from embedrl_verl.trainer.checks_async import async_rules, mini_batches

logger = logging.getLogger(__name__)


def check_run_config(config: Any) -> None:
    """Check what EG-RL needs of verl's own keys.

    Raises:
        ConfigError: the first rule that does not hold, with the value found and the fix.
    """
    embedrl = load_embedrl_config(config)
    embedder = embedrl.embedder
    together = DataSettings.from_config(config.data).pairs_together
    prompts = int(config.data.train_batch_size)
    rollouts = int(config.actor_rollout_ref.rollout.n)
    pieces = config.data.val_batch_size
    actor = config.actor_rollout_ref.actor
    longest = longest_row(config)
    mini = int(config.actor_rollout_ref.actor.ppo_mini_batch_size)
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    ranks = embedder.nnodes * embedder.n_gpus_per_node or devices
    senders = int(config.actor_rollout_ref.rollout.agent.num_workers)
    split = embedder.tensor_model_parallel_size * embedder.pipeline_model_parallel_size
    batch = prompts // mini_batches(config)
    chosen = batch * (rollouts if embedder.train.rollouts == "all" else 1)
    rules = [
        *async_rules(config),
        *_executor_rules(config),
        *_model_rules(config, embedder),
        (
            not embedder.train.enable or chosen >= ranks // split,
            f"co-training needs a row for each of the Embedder's {ranks // split} data-parallel ranks; "
            f"embedrl.embedder.train.rollouts={embedder.train.rollouts} gives at most {chosen} of a batch",
        ),
        (
            embedder.backend != "server" or embedder.server.limit >= senders,
            f"embedrl.embedder.server.limit is shared out among the {senders} agent-loop workers that send "
            f"(actor_rollout_ref.rollout.agent.num_workers), so it must be at least {senders}; "
            f"got {embedder.server.limit}",
        ),
        (
            ranks % split == 0,
            "embedrl.embedder.tensor_model_parallel_size x pipeline_model_parallel_size must divide the Embedder's "
            f"{ranks} devices; got {split}",
        ),
        (
            prompts >= 2 and prompts % 2 == 0,
            f"data.train_batch_size counts prompts, two for each pair, so it must be even; got {prompts}",
        ),
        (
            batch >= 4,
            "a batch that is rewarded at once must have two pairs or more (they are each other's negatives); got "
            f"{batch // 2}: raise data.train_batch_size",
        ),
        (
            str(config.algorithm.adv_estimator) != "grpo" or rollouts >= 2,
            f"actor_rollout_ref.rollout.n must be at least 2: GRPO compares the rollouts of one prompt; got {rollouts}",
        ),
        (
            not actor.use_dynamic_bsz or int(actor.ppo_max_token_len_per_gpu) >= longest,
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu ({actor.get('ppo_max_token_len_per_gpu')}) must hold "
            f"the longest row: data.max_prompt_length + data.max_response_length = {longest}",
        ),
        (
            OmegaConf.select(config, "data.sampler.class_path") is None,
            "data.sampler.class_path must be null: batches are made of whole pairs of one source; "
            f"got {OmegaConf.select(config, 'data.sampler.class_path')}. data.shuffle=False keeps the files' order",
        ),
        (
            (prompts // 2) % together == 0,
            f"data.embedrl.pairs_together must divide the {prompts // 2} pairs of a batch; got {together}",
        ),
        (
            prompts % mini == 0,
            f"data.train_batch_size ({prompts}) must be divisible by "
            f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini}), both in prompts",
        ),
        (
            (mini * rollouts) % devices == 0,
            f"one update has ppo_mini_batch_size x rollout.n = {mini} x {rollouts} = {mini * rollouts} rows, which "
            f"must be divisible by the {devices} devices (trainer.nnodes x trainer.n_gpus_per_node)",
        ),
        (
            pieces is None or (pieces >= 2 and pieces % 2 == 0 and not config.data.validation_shuffle),
            "data.val_batch_size counts prompts, two for each pair, so it must be even, and data.validation_shuffle "
            f"False, or null; got {pieces} with data.validation_shuffle={config.data.validation_shuffle}",
        ),
        (
            config.data.get("gen_batch_size") in (None, prompts),
            "data.gen_batch_size must be null: a smaller fetch could split a pair; "
            f"got {config.data.get('gen_batch_size')}",
        ),
        (
            config.reward.reward_manager.name == "embedder_guided",
            f"reward.reward_manager.name must be embedder_guided; got {config.reward.reward_manager.name}",
        ),
        (
            not (config.reward.reward_model.enable and embedrl.judge.urls),
            "the judge's servers are either verl's (reward.reward_model.enable=True) or embedrl.judge.urls; got both",
        ),
        (
            not config.reward.reward_model.enable or bool(config.reward.reward_model.model_path),
            "reward.reward_model.enable=True starts a judge and needs reward.reward_model.model_path; got null",
        ),
        (
            int(config.reward.num_workers) == 0,
            f"reward.num_workers must be 0: the reward needs the whole batch; got {config.reward.num_workers}",
        ),
        (
            not config.algorithm.get("filter_groups", {}).get("enable", False),
            "algorithm.filter_groups.enable must be False: it needs rewards before the batch is complete",
        ),
        (
            not config.trainer.v1.sampler.get("sync_refill_failed_groups", False),
            "trainer.v1.sampler.sync_refill_failed_groups must be False: single prompts would break the pairs",
        ),
        (
            config.actor_rollout_ref.rollout.agent.default_agent_loop == "tcot",
            "actor_rollout_ref.rollout.agent.default_agent_loop must be tcot; "
            f"got {config.actor_rollout_ref.rollout.agent.default_agent_loop}",
        ),
        (
            bool(config.reward.custom_reward_function.path),
            "reward.custom_reward_function.path must name a reward function (see reward/); got null",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def _model_rules(config: Any, embedder: EmbedderConfig) -> list[tuple[bool, str]]:
    """Engines, adapters and attentions that do not go together."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    attention = model.override_config.get("attn_implementation")
    engines = [one for role in (actor, config.actor_rollout_ref.ref) for one in (role, role.get("fsdp_config", {}))]
    split = max(int(one.get("ulysses_sequence_parallel_size", 1) or 1) for one in engines)
    lora, trained = model.get("lora_rank", 0), embedder.train.enable and embedder.train.lora_rank
    return [
        (
            attention == "flash_attention_2" or split == 1,
            "ulysses_sequence_parallel_size above 1 (of actor or ref) needs attention=flash_attention_2; "
            f"got {split} with {attention}",
        ),
        (
            not model.use_remove_padding or attention != "eager",
            "packed rows (actor_rollout_ref.model.use_remove_padding=True) need attention=torch_varlen, "
            f"flash_attention_2 or sdpa; got {attention}",
        ),
        (
            not lora or _leaves_out_vision(model.get("exclude_modules")),
            "an adapter must leave out the vision part (vLLM serves adapters of the language part alone): "
            "actor_rollout_ref.model.exclude_modules must be a pattern that matches its modules, as '.*visual.*'; "
            f"got {model.get('exclude_modules')}",
        ),
        (
            not lora or actor.strategy != "fsdp",
            "adapters need FSDP2: PEFT's do not work under FSDP1. Set actor_rollout_ref.actor.strategy=fsdp2; "
            f"got fsdp with actor_rollout_ref.model.lora_rank={lora}",
        ),
        (
            not trained or embedder.strategy != "fsdp",
            "adapters need FSDP2: PEFT's do not work under FSDP1. Set embedrl.embedder.strategy=fsdp2; "
            f"got fsdp with embedrl.embedder.train.lora_rank={trained}",
        ),
    ]


def _leaves_out_vision(pattern: object) -> bool:
    """Whether PEFT leaves out every module of the vision part (it matches the whole name)."""
    names = ("model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0", "model.visual.patch_embed.proj")
    return isinstance(pattern, str) and all(re.fullmatch(pattern, name) for name in names)


def _executor_rules(config: Any) -> list[tuple[bool, str]]:
    """vLLM's executor `uni` runs the model in the engine's own process: there is no process for a second device, for
    which the engine would wait for ever."""
    sections = ["actor_rollout_ref.rollout"]
    if config.reward.reward_model.enable:
        sections.append("reward.reward_model.rollout")
    rules = []
    for name in sections:
        rollout, key = OmegaConf.select(config, name), f"{name}.engine_kwargs.vllm.distributed_executor_backend"
        devices = int(rollout.tensor_model_parallel_size * rollout.pipeline_model_parallel_size)
        rules.append(
            (
                OmegaConf.select(config, key) != "uni" or devices == 1,
                f"{key}=uni is for servers of one device; got {name}.tensor_model_parallel_size x "
                f"pipeline_model_parallel_size = {devices}. Set {key}=mp",
            )
        )
    return rules


def refuse_videos_that_megatron_misplaces(config: Any, dataset: Any) -> None:
    """Refuse, under Megatron, videos whose positions count seconds (Qwen2.5-VL).

    Megatron-Bridge 0.5 computes the positions itself, without the frame rate, and they are wrong.

    Args:
        dataset: a `TCoTDataset`.

    Raises:
        ConfigError: the actor is such a model and the data have a video.
    """
    if config.actor_rollout_ref.actor.strategy != "megatron" or facts_of(dataset.family).clip_time != "seconds":
        return
    if dataset.first_video is not None:
        raise ConfigError(
            "actor_rollout_ref.actor.strategy=megatron places the frames of this family's videos wrongly, and "
            f"{dataset.first_video} has one. Use the FSDP recipe of that family, or data without videos"
        )


def longest_row(config: Any) -> int:
    """Tokens of the longest prompt with the longest response."""
    return int(config.data.max_prompt_length) + int(config.data.max_response_length)


def last_step(run: Any, steps_per_epoch: int) -> int:
    """The step that is a run's last one, for which verl makes a checkpoint and a validation.

    Args:
        run: section `trainer`.
    """
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


def has_judge(config: Any) -> bool:
    """Whether a run configuration names a judge."""
    return bool(config.reward.reward_model.enable or config.embedrl.judge.urls)


def check_files(config: Any) -> None:
    """Check that every local file and folder a run names is there. Hub ids (no such local path, one slash) pass.

    Raises:
        ConfigError: a file is missing; the message names the key.
    """
    for key in ("data.train_files", "data.val_files", "embedrl.embedder.train.anchor_files"):
        value = OmegaConf.select(config, key)
        files = [value] if isinstance(value, str) else list(value or [])
        if not files and key.startswith("data."):
            raise ConfigError(f"{key} must name at least one parquet file of pair records; got {value!r}")
        for file in files:
            if "://" not in file and not Path(file).expanduser().exists():
                raise ConfigError(f"{key}: no such file or data set folder: {file}")
    models = ["actor_rollout_ref.model.path", "embedrl.embedder.path"]
    if config.reward.reward_model.enable:
        models.append("reward.reward_model.model_path")
    for key in models:
        value = str(OmegaConf.select(config, key))
        if set("[]*?") & set(value):
            raise ConfigError(f"{key}: vLLM reads [, ], * and ? in a model's path as a pattern; rename it: {value}")
        looks_like_hub_id = value.count("/") == 1 and not value.startswith((".", "/", "~"))
        if not looks_like_hub_id and "://" not in value and not Path(value).expanduser().is_dir():
            raise ConfigError(f"{key}: no such folder: {value}")
    root = config.data.get("media_root")
    if root and not Path(root).expanduser().is_dir():
        raise ConfigError(f"data.media_root: no such folder: {root}")
    function = str(config.reward.custom_reward_function.path)
    if not function.startswith("pkg://") and not Path(function.removeprefix("file://")).is_file():
        raise ConfigError(f"reward.custom_reward_function.path: no such file: {function}")
