# SPDX-License-Identifier: Apache-2.0
"""Every rule about the settings of a run, once: `plan`, `train` and the trainer itself ask here.

Types and ranges of our own sections are in `schema`. Here is what must fit across sections, and what EG-RL needs of
verl's keys; then what needs more than settings: files, the Reasoner's family, the data, a checkpoint. A rule is (key,
whether its value holds, what it must be).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.config.batch import SEPARATE, BatchPlan, is_megatron, longest_row, mini_batches, replica_size
from embedrl_verl.config.schema import EmbedderConfig, EmbedRLConfig, MediaConfig, Rule
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FACTS, FAMILY_OF_MODEL_TYPE, facts_of, family_of

logger = logging.getLogger(__name__)

COLOCATE = "egrl_colocate_async"
MEGATRON_TYPES = tuple(kind for facts in FACTS.values() for kind in facts.megatron)
NO_MEGATRON = (
    f"of a family that verl 0.9.1's Megatron engine can load ({', '.join(MEGATRON_TYPES)}). Use the FSDP recipe"
)
VISION_MODULES = ("model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0", "model.visual.patch_embed.proj")

NUMBERS = {
    "data": "train_batch_size max_prompt_length max_response_length",
    "actor_rollout_ref.rollout": "n temperature tensor_model_parallel_size nnodes n_gpus_per_node",
    "actor_rollout_ref.actor": "ppo_mini_batch_size clip_ratio kl_loss_coef ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.optim": "lr",
    "trainer": "nnodes n_gpus_per_node total_epochs save_freq test_freq",
    "reward.reward_model": "nnodes n_gpus_per_node",
}
"""Keys without which nothing can be counted, and whose types verl does not check."""
FRACTIONS = ("temperature", "clip_ratio", "kl_loss_coef", "lr")

Rules = Iterator[Rule]


def check_run_config(config: Any) -> EmbedRLConfig:
    """Check a whole run configuration (DictConfig) and return its section `embedrl`."""
    _check(config, _number_rules(config))
    embedrl, media, batch = load_embedrl_config(config), MediaConfig.from_config(config.data), BatchPlan.of(config)
    for rules in (
        _mode_rules(config, batch, media.pairs_together),
        _engine_rules(config, media.family),
        _batch_rules(config, batch, media.pairs_together),
        _embedder_rules(config, batch, embedrl.embedder),
        _reward_rules(config, embedrl),
    ):
        _check(config, rules)
    return embedrl


def _check(config: Any, rules: Rules) -> None:
    for key, holds, rule in rules:
        if not holds:
            found = OmegaConf.select(config, key)
            raise ConfigError(f"{key} must be {rule}; got {'null' if found is None else found}")


def _number_rules(config: Any) -> Rules:
    for section, names in NUMBERS.items():
        for name in names.split():
            key, is_fraction = f"{section}.{name}", name in FRACTIONS
            value = OmegaConf.select(config, key)
            holds = isinstance(value, (int, float) if is_fraction else int) and not isinstance(value, bool)
            yield key, holds, "a number" if is_fraction else "a whole number"
    steps = config.trainer.total_training_steps
    yield "trainer.total_training_steps", steps is None or isinstance(steps, int), "a whole number, or null"


def _mode_rules(config: Any, batch: BatchPlan, together: int) -> Rules:
    """The asynchronous modes."""
    v1, rollout, judge = config.trainer.v1, config.actor_rollout_ref.rollout, config.reward.reward_model
    mode, limit, mini = v1.trainer_mode, v1.sampler.max_off_policy_threshold, batch.mini_prompts
    hybrid = bool(config.actor_rollout_ref.get("hybrid_engine", True))
    yield "actor_rollout_ref.hybrid_engine", hybrid or mode == SEPARATE, f"True with trainer mode {mode}"
    if mode not in (COLOCATE, SEPARATE):
        return
    bounds = limit is None or (isinstance(limit, int) and limit >= 1)
    yield "trainer.v1.sampler.max_off_policy_threshold", bounds, "1 or more, or null for no limit"
    strategy = v1.sampler.max_off_policy_strategy
    yield "trainer.v1.sampler.max_off_policy_strategy", strategy in ("drop", "wait"), "drop or wait"
    warmup = f"trainer.v1.{mode.removeprefix('egrl_')}.num_warmup_batches"
    yield warmup, OmegaConf.select(config, warmup) >= 0, "0 or more"
    not_ours = "False: rollouts from a file are not asynchronous, and name no pairs"
    yield "skip.rollout_tq.enable", not config.skip.rollout_tq.enable, not_ours
    if mode == COLOCATE:
        return
    steps, devices = v1.separate_async.parameter_sync_step, int(rollout.nnodes) * int(rollout.n_gpus_per_node)
    yield "trainer.v1.separate_async.parameter_sync_step", steps >= 1, "1 or more"
    yield (
        "data.train_batch_size",
        batch.prompts == steps * mini,
        f"trainer.v1.separate_async.parameter_sync_step ({steps}) x actor_rollout_ref.actor.ppo_mini_batch_size "
        f"({mini}), in prompts: each mini-batch is rewarded by itself",
    )
    yield (
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        mini % (2 * together) == 0,
        f"a multiple of the {2 * together} prompts that stay together (2 sides x data.embedrl.pairs_together)",
    )
    yield (
        "actor_rollout_ref.rollout.nnodes",
        devices >= 1 and devices % replica_size(rollout) == 0,
        f"such that nnodes x n_gpus_per_node ({devices}), the devices of the rollout alone, are a multiple of one "
        f"replica's {replica_size(rollout)}",
    )
    yield (
        "actor_rollout_ref.rollout.checkpoint_engine.backend",
        rollout.checkpoint_engine.backend != "naive",
        "one that reaches other processes: nccl or nixl on GPUs (gloo with platform=cpu)",
    )
    yield (
        "reward.reward_model.enable_resource_pool",
        not judge.enable or judge.enable_resource_pool,
        "True: rollouts never pause to make room for a judge that verl serves",
    )


def _engine_rules(config: Any, family: str) -> Rules:
    """Engines, adapters, attentions and executors that go together."""
    roles, judge = config.actor_rollout_ref, config.reward.reward_model
    model, lora = roles.model, roles.model.get("lora_rank", 0)
    attention, excluded = model.override_config.get("attn_implementation"), model.get("exclude_modules")
    served = {"actor_rollout_ref.rollout": roles.rollout, "reward.reward_model.rollout": judge.enable and judge.rollout}
    for name, rollout in served.items():
        if rollout:  # without a process for it vLLM's engine would wait for a second device for ever
            key = f"{name}.engine_kwargs.vllm.distributed_executor_backend"
            devices = int(rollout.tensor_model_parallel_size * rollout.pipeline_model_parallel_size)
            one = OmegaConf.select(config, key) != "uni" or devices == 1
            yield key, one, f"mp: a server has {devices} devices ({name}.tensor_ x pipeline_model_parallel_size)"
    for role in ("actor", "actor.fsdp_config", "ref", "ref.fsdp_config"):
        key = f"actor_rollout_ref.{role}.ulysses_sequence_parallel_size"
        alone = (OmegaConf.select(config, key) or 1) == 1
        rule = f"1 with attention={attention}: it needs flash_attention_2"
        yield key, alone or attention == "flash_attention_2", rule
    yield (
        "actor_rollout_ref.model.override_config.attn_implementation",
        not model.use_remove_padding or attention != "eager",
        "torch_varlen, flash_attention_2 or sdpa for packed rows (actor_rollout_ref.model.use_remove_padding=True)",
    )
    yield (
        "actor_rollout_ref.model.exclude_modules",
        not lora or (isinstance(excluded, str) and all(re.fullmatch(excluded, name) for name in VISION_MODULES)),
        "a pattern that matches every module of the vision part, as '.*visual.*': vLLM serves adapters of the language "
        "part alone",
    )
    fsdp1 = "fsdp2 with an adapter (lora_rank above 0): PEFT's do not work under FSDP1"
    yield "actor_rollout_ref.actor.strategy", not lora or roles.actor.strategy != "fsdp", fsdp1
    yield "data.embedrl.family", not is_megatron(config) or family in ("auto", *MEGATRON_TYPES), NO_MEGATRON


def _batch_rules(config: Any, batch: BatchPlan, together: int) -> Rules:
    """The arithmetic of a step, and the lengths of its rows."""
    data, actor, roles = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref
    prompts, devices, pairs = batch.prompts, "trainer.n_gpus_per_node", batch.pairs // mini_batches(config)
    even = "even: it counts prompts, two for each pair"
    yield "data.train_batch_size", prompts >= 2 and prompts % 2 == 0, even
    temperature = roles.rollout.temperature
    yield (
        "actor_rollout_ref.rollout.temperature",
        temperature > 0,
        "positive: greedy rollouts of a prompt are all equal",
    )
    yield (
        "data.train_batch_size",
        batch.mini_prompts >= 1 and prompts % batch.mini_prompts == 0,
        f"divisible by actor_rollout_ref.actor.ppo_mini_batch_size ({batch.mini_prompts}); both count prompts",
    )
    yield (
        "data.train_batch_size",
        pairs >= 2,
        f"larger: what is rewarded at once must have two pairs or more (each other's negatives), and has {pairs}",
    )
    compares = str(config.algorithm.adv_estimator) == "grpo"
    yield (
        "actor_rollout_ref.rollout.n",
        not compares or batch.rollouts >= 2,
        "2 or more: GRPO compares the rollouts of one prompt",
    )
    total = f"such that all {batch.devices} devices (with trainer.nnodes) are divisible by"
    split = batch.model_parallel
    shared = batch.devices >= split and batch.devices % split == 0
    yield devices, shared, f"{total} the actor's model-parallel size ({split})"
    # Without servers on the training devices nothing has to fit there.
    replica = replica_size(roles.rollout) if roles.hybrid_engine else 1
    size = f"the size of one rollout replica ({replica}: tensor x data x pipeline parallel size)"
    yield devices, batch.devices % replica == 0, f"{total} {size}"
    yield (
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        batch.mini_rows % batch.data_parallel == 0,
        f"one whose rows are divisible by the {batch.data_parallel} data-parallel ranks: one update has "
        f"ppo_mini_batch_size x rollout.n = {batch.mini_prompts} x {batch.rollouts} = {batch.mini_rows} rows",
    )
    longest = longest_row(config)
    yield (
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        not actor.use_dynamic_bsz or int(actor.ppo_max_token_len_per_gpu) >= longest,
        f"at least the longest row: data.max_prompt_length + data.max_response_length = {longest}",
    )
    divides = f"a divisor of the {batch.pairs} pairs of a batch"
    yield "data.embedrl.pairs_together", batch.pairs % together == 0, divides
    pieces = data.val_batch_size
    yield "data.val_batch_size", pieces is None or (pieces >= 2 and pieces % 2 == 0), f"{even}. null: one piece"
    between = "False, or data.val_batch_size null: a piece of a validation has whole pairs"
    yield "data.validation_shuffle", pieces is None or not data.validation_shuffle, between
    whole = "null: a smaller fetch could split a pair"
    yield "data.gen_batch_size", data.get("gen_batch_size") in (None, prompts), whole


def _embedder_rules(config: Any, batch: BatchPlan, embedder: EmbedderConfig) -> Rules:
    train, strategy = embedder.train, "embedrl.embedder.strategy"
    devices = embedder.nnodes * embedder.n_gpus_per_node or batch.devices
    split = embedder.tensor_model_parallel_size * embedder.pipeline_model_parallel_size
    yield (
        "embedrl.embedder.tensor_model_parallel_size",
        devices % split == 0,
        f"such that its product with pipeline_model_parallel_size ({split}) divides the Embedder's {devices} devices",
    )
    chosen = batch.prompts // mini_batches(config) * (batch.rollouts if train.rollouts == "all" else 1)
    yield (
        "embedrl.embedder.train.rollouts",
        not train.enable or chosen >= devices // split,
        f"all, or the batch larger: co-training needs a row for each of the Embedder's {devices // split} "
        f"data-parallel ranks, and has at most {chosen} of a batch",
    )
    fsdp1 = "fsdp2 with an adapter (embedrl.embedder.train.lora_rank above 0): PEFT's do not work under FSDP1"
    yield strategy, not (train.enable and train.lora_rank) or embedder.strategy != "fsdp", fsdp1
    on_cpu = embedder.backend == "worker" and str(config.trainer.device) == "cpu"
    yield strategy, not on_cpu or embedder.strategy == "fsdp2", "fsdp2 on a CPU"
    senders = int(config.actor_rollout_ref.rollout.agent.num_workers)
    yield (
        "embedrl.embedder.server.limit",
        embedder.backend != "server" or embedder.server.limit >= senders,
        f"at least {senders}: it is shared out among the agent-loop workers that send "
        "(actor_rollout_ref.rollout.agent.num_workers)",
    )


def _reward_rules(config: Any, embedrl: EmbedRLConfig) -> Rules:
    judge, agent = config.reward.reward_model, config.actor_rollout_ref.rollout.agent
    manager, refills = config.reward.reward_manager.name, config.trainer.v1.sampler.get("sync_refill_failed_groups")
    filters = config.algorithm.get("filter_groups", {}).get("enable")
    key, sampler = "data.sampler.class_path", "null: batches are made of whole pairs of one source"
    yield key, OmegaConf.select(config, key) is None, f"{sampler}. data.shuffle=False keeps the files' order"
    yield "reward.reward_manager.name", manager == "embedder_guided", "embedder_guided: rewards are of whole batches"
    yield "reward.num_workers", int(config.reward.num_workers) == 0, "0: the reward needs the whole batch"
    needs_rewards = "False: it needs rewards before the batch is complete"
    yield "algorithm.filter_groups.enable", not filters, needs_rewards
    yield "trainer.v1.sampler.sync_refill_failed_groups", not refills, "False: single prompts would break the pairs"
    loop = "actor_rollout_ref.rollout.agent.default_agent_loop"
    yield loop, agent.default_agent_loop == "tcot", "tcot, which parses the T-CoT and cuts its evidence"
    one = "[] with reward.reward_model.enable=True: the judge's servers are either verl's or these"
    yield "embedrl.judge.urls", not (judge.enable and embedrl.judge.urls), one
    model = "a folder or hub id with reward.reward_model.enable=True, which starts a judge"
    yield "reward.reward_model.model_path", not judge.enable or bool(judge.model_path), model
    function = "a reward function: a file (see reward/) or pkg://module"
    yield "reward.custom_reward_function.path", bool(config.reward.custom_reward_function.path), function


def has_judge(config: Any) -> bool:
    """Whether a run configuration names a judge."""
    return bool(config.reward.reward_model.enable or config.embedrl.judge.urls)


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


def is_hub_id(path: str) -> bool:
    """Whether it is OWNER/NAME, and not a file of a folder that is here."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and path[0] not in ".~" and not Path(owner).is_dir()


def no_such_model(path: str) -> str:
    """What is wrong with a path that is not here and no hub id: a mistyped folder. Else ""."""
    if is_hub_id(path) or Path(path).expanduser().is_dir():
        return ""
    return f"no such folder: {path} (name a folder, or a hub id OWNER/NAME)"


def missing_inputs(config: Any) -> list[str]:
    """What is not there of the files and folders that a run names. Hub ids (no such local path, one slash) pass."""
    needed = ("data.train_files", "data.val_files")
    named = {key: files_of(config, key) for key in (*needed, "embedrl.embedder.train.anchor_files")}
    problems = [f"{key} must name at least one parquet file of pair records" for key in needed if not named[key]]
    problems += missing_files(named, config.data.get("media_root"))
    judge = ["reward.reward_model.model_path"] if config.reward.reward_model.enable else []
    for key in ("actor_rollout_ref.model.path", "embedrl.embedder.path", *judge):
        value = str(OmegaConf.select(config, key))
        if set("[]*?") & set(value):
            problems.append(f"{key}: vLLM reads [, ], * and ? in a model's path as a pattern; rename it: {value}")
        elif "://" not in value and (fault := no_such_model(value)):
            problems.append(f"{key}: {fault}")
    return problems


def check_files(config: Any) -> None:
    """Refuse a run with `missing_inputs`."""
    if missing := missing_inputs(config):
        raise ConfigError("; ".join(missing))


def check_family(config: Any, found: str | None) -> None:
    """Check the model type of the Reasoner's folder (None: it is not here) against the settings."""
    named, path = MediaConfig.from_config(config.data).family, config.actor_rollout_ref.model.path
    # A type that is not known may share the prompts of the family that is named.
    if found in FAMILY_OF_MODEL_TYPE and named != "auto" and family_of(found) != family_of(named):
        raise ConfigError(f"data.embedrl.family is {named}, but {path} is a {found}. Use the recipe of that family")
    if found is not None and is_megatron(config) and found not in MEGATRON_TYPES:
        raise ConfigError(f"actor_rollout_ref.model.path must be {NO_MEGATRON}; {path} is a {found}")


def refuse_videos_that_megatron_misplaces(config: Any, dataset: Any) -> None:
    """Refuse a `TCoTDataset` with videos whose positions count seconds (Qwen2.5-VL) under Megatron.

    Megatron-Bridge 0.5 computes the positions itself, without the frame rate, and they are wrong.
    """
    if is_megatron(config) and facts_of(dataset.family).clip_time == "seconds" and dataset.first_video is not None:
        raise ConfigError(
            "actor_rollout_ref.actor.strategy=megatron places the frames of this family's videos wrongly, and "
            f"{dataset.first_video} has one. Use the FSDP recipe of that family, or data without videos"
        )


def last_step(run: Any, steps_per_epoch: int) -> int:
    """The last step of a run (section `trainer`), for which verl makes a checkpoint and a validation."""
    possible, wanted = steps_per_epoch * int(run.total_epochs), run.total_training_steps
    if possible < 1:  # prompts that are too long have been left out by now
        raise ConfigError(
            f"the training data must make a step; {steps_per_epoch} an epoch, trainer.total_epochs={run.total_epochs}. "
            "Lower data.train_batch_size, or raise data.max_prompt_length"
        )
    if wanted is not None and wanted > possible:
        logger.warning(
            "EG-RL: step %d is the last one: trainer.total_epochs=%d has no more (trainer.total_training_steps=%d)",
            possible,
            run.total_epochs,
            wanted,
        )
    return possible if wanted is None else min(int(wanted), possible)


def check_resumed_step(folder: Path, step: int, last: int) -> None:
    """A resumed run has steps to do, or has just done its last; ConfigError for a checkpoint of a later one."""
    if step > last:
        raise ConfigError(
            f"{folder} is of step {step}, and this run ends at step {last}: raise trainer.total_training_steps (or "
            "trainer.total_epochs), or start a shorter run in another trainer.default_local_dir"
        )
