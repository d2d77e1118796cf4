# SPDX-License-Identifier: Apache-2.0
"""What must fit across the sections of a run's configuration, and what EG-RL needs of verl's keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.config.batch import SEPARATE, BatchPlan, is_megatron, longest_row, mini_batches, replica_size
from embedrl_verl.config.schema import EmbedderConfig, EmbedRLConfig, MediaConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FACTS

COLOCATE = "egrl_colocate_async"
MEGATRON_TYPES = tuple(kind for facts in FACTS.values() for kind in facts.megatron)
VISION_MODULES = ("model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0", "model.visual.patch_embed.proj")

FIXED: Mapping[str, tuple[object, str]] = {
    "data.sampler.class_path": (
        None,
        "batches are made of whole pairs of one source (data.shuffle=False keeps the files' order)",
    ),
    "reward.reward_manager.name": ("embedder_guided", "rewards are of whole batches"),
    "reward.num_workers": (0, "the reward needs the whole batch"),
    "algorithm.filter_groups.enable": (False, "it needs rewards before the batch is complete"),
    "trainer.v1.sampler.sync_refill_failed_groups": (False, "single prompts would break the pairs"),
    "actor_rollout_ref.rollout.agent.default_agent_loop": ("tcot", "it parses the T-CoT and cuts the evidence"),
}
"""verl's keys that EG-RL needs at one value, and why. A key that is not there is off."""

Rule = tuple[bool, str]


def check_run_config(config: Any) -> EmbedRLConfig:
    """Check a whole run configuration (DictConfig) and return its section `embedrl`.

    Raises:
        ConfigError: the first rule that does not hold, with the value found and the fix.
    """
    embedrl, media, batch = load_embedrl_config(config), MediaConfig.from_config(config.data), BatchPlan.of(config)
    for rules in (
        _mode_rules(config, batch, media.pairs_together),
        _engine_rules(config, media.family),
        _batch_rules(config, batch, media.pairs_together),
        _embedder_rules(config, batch, embedrl.embedder),
        _reward_rules(config, embedrl),
    ):
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)
    return embedrl


def _mode_rules(config: Any, batch: BatchPlan, together: int) -> Iterator[Rule]:
    """The asynchronous modes."""
    v1, rollout, judge = config.trainer.v1, config.actor_rollout_ref.rollout, config.reward.reward_model
    mode, sampler = v1.trainer_mode, v1.sampler
    hybrid = bool(config.actor_rollout_ref.get("hybrid_engine", True))
    yield hybrid or mode == SEPARATE, f"actor_rollout_ref.hybrid_engine must be True with trainer mode {mode}"
    if mode not in (COLOCATE, SEPARATE):
        return
    name = f"trainer.v1.{mode.removeprefix('egrl_')}"
    warmup, threshold = OmegaConf.select(config, f"{name}.num_warmup_batches"), sampler.max_off_policy_threshold
    yield (
        threshold is None or (isinstance(threshold, int) and threshold >= 1),
        f"trainer.v1.sampler.max_off_policy_threshold must be 1 or more, or null for no limit; got {threshold}",
    )
    yield (
        sampler.max_off_policy_strategy in ("drop", "wait"),
        f"trainer.v1.sampler.max_off_policy_strategy must be drop or wait; got {sampler.max_off_policy_strategy}",
    )
    yield warmup >= 0, f"{name}.num_warmup_batches must be 0 or more; got {warmup}"
    yield (
        not config.skip.rollout_tq.enable,
        "skip.rollout_tq.enable must be False: rollouts from a file are not asynchronous, and name no pairs",
    )
    if mode == COLOCATE:
        return
    steps, mini, replica = v1.separate_async.parameter_sync_step, batch.mini_prompts, replica_size(rollout)
    devices = int(rollout.nnodes) * int(rollout.n_gpus_per_node)
    yield steps >= 1, f"trainer.v1.separate_async.parameter_sync_step must be 1 or more; got {steps}"
    yield (
        batch.prompts == steps * mini,
        f"data.train_batch_size ({batch.prompts}) must be trainer.v1.separate_async.parameter_sync_step ({steps}) x "
        f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini}), in prompts: each mini-batch is rewarded by itself",
    )
    yield (
        mini % (2 * together) == 0,
        f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini} prompts) must be a multiple of the {2 * together} "
        f"prompts that stay together (2 sides x data.embedrl.pairs_together={together})",
    )
    yield (
        devices >= 1 and devices % replica == 0,
        "actor_rollout_ref.rollout.nnodes x .n_gpus_per_node are the devices of the rollout alone; they must be a "
        f"multiple of one replica's {replica}; got {rollout.nnodes} x {rollout.n_gpus_per_node}",
    )
    yield (
        rollout.checkpoint_engine.backend != "naive",
        "actor_rollout_ref.rollout.checkpoint_engine.backend must reach other processes: nccl or nixl on GPUs (gloo "
        "with platform=cpu); got naive",
    )
    yield (
        not judge.enable or judge.enable_resource_pool,
        "a judge that verl serves must have devices of its own (reward.reward_model.enable_resource_pool=True): "
        "rollouts never pause to make room for it",
    )


def _engine_rules(config: Any, family: str) -> Iterator[Rule]:
    """Engines, adapters, attentions and executors that go together."""
    roles = config.actor_rollout_ref
    model, lora = roles.model, roles.model.get("lora_rank", 0)
    attention, excluded = model.override_config.get("attn_implementation"), model.get("exclude_modules")
    # Without a process for it vLLM's engine would wait for a second device for ever.
    for name in ("actor_rollout_ref.rollout", "reward.reward_model.rollout"):
        if name.startswith("reward") and not config.reward.reward_model.enable:
            continue
        rollout, key = OmegaConf.select(config, name), f"{name}.engine_kwargs.vllm.distributed_executor_backend"
        devices = int(rollout.tensor_model_parallel_size * rollout.pipeline_model_parallel_size)
        yield (
            OmegaConf.select(config, key) != "uni" or devices == 1,
            f"{key}=uni is for servers of one device; got {name}.tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {devices}. Set {key}=mp",
        )
    engines = [one for role in (roles.actor, roles.ref) for one in (role, role.get("fsdp_config", {}))]
    split = max(int(one.get("ulysses_sequence_parallel_size", 1) or 1) for one in engines)
    yield (
        attention == "flash_attention_2" or split == 1,
        "ulysses_sequence_parallel_size above 1 (of actor or ref) needs attention=flash_attention_2; "
        f"got {split} with {attention}",
    )
    yield (
        not model.use_remove_padding or attention != "eager",
        "packed rows (actor_rollout_ref.model.use_remove_padding=True) need attention=torch_varlen, flash_attention_2 "
        f"or sdpa; got {attention}",
    )
    yield (
        not lora or (isinstance(excluded, str) and all(re.fullmatch(excluded, name) for name in VISION_MODULES)),
        "an adapter must leave out the vision part (vLLM serves adapters of the language part alone): "
        "actor_rollout_ref.model.exclude_modules must be a pattern that matches its modules, as '.*visual.*'; "
        f"got {excluded}",
    )
    yield (
        not lora or roles.actor.strategy != "fsdp",
        "adapters need FSDP2: PEFT's do not work under FSDP1. Set actor_rollout_ref.actor.strategy=fsdp2; "
        f"got fsdp with actor_rollout_ref.model.lora_rank={lora}",
    )
    yield not is_megatron(config) or family == "auto" or family in MEGATRON_TYPES, no_megatron(family)


def _batch_rules(config: Any, batch: BatchPlan, together: int) -> Iterator[Rule]:
    """The arithmetic of a step, and the lengths of its rows."""
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    devices = f"{batch.devices} devices (trainer.nnodes x trainer.n_gpus_per_node)"
    yield (
        batch.prompts >= 2 and batch.prompts % 2 == 0,
        f"data.train_batch_size counts prompts, two for each pair, so it must be even; got {batch.prompts}",
    )
    yield (
        batch.mini_prompts >= 1 and batch.prompts % batch.mini_prompts == 0,
        f"data.train_batch_size ({batch.prompts}) must be divisible by actor_rollout_ref.actor.ppo_mini_batch_size "
        f"({batch.mini_prompts}); both count prompts",
    )
    pairs = batch.pairs // mini_batches(config)
    yield (
        pairs >= 2,
        "a batch that is rewarded at once must have two pairs or more (they are each other's negatives); got "
        f"{pairs}: raise data.train_batch_size",
    )
    yield (
        str(config.algorithm.adv_estimator) != "grpo" or batch.rollouts >= 2,
        "actor_rollout_ref.rollout.n must be at least 2: GRPO compares the rollouts of one prompt; "
        f"got {batch.rollouts}",
    )
    yield (
        batch.devices >= 1 and batch.devices % batch.model_parallel == 0,
        f"{devices} must be divisible by the actor's model-parallel size ({batch.model_parallel})",
    )
    # Without servers on the training devices nothing has to fit there.
    replica = replica_size(rollout) if config.actor_rollout_ref.hybrid_engine else 1
    yield (
        batch.devices % replica == 0,
        f"{devices} must be divisible by the size of one rollout replica ({replica}: tensor x data x pipeline "
        "parallel size)",
    )
    yield (
        batch.mini_rows % batch.data_parallel == 0,
        f"one update has ppo_mini_batch_size x rollout.n = {batch.mini_prompts} x {batch.rollouts} = "
        f"{batch.mini_rows} rows, which must be divisible by the {batch.data_parallel} data-parallel ranks; change "
        "data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size, or the number of devices",
    )
    tokens, longest = actor.get("ppo_max_token_len_per_gpu"), longest_row(config)
    yield (
        not actor.use_dynamic_bsz or int(tokens) >= longest,
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu ({tokens}) must hold the longest row: "
        f"data.max_prompt_length + data.max_response_length = {longest}",
    )
    yield (
        batch.pairs % together == 0,
        f"data.embedrl.pairs_together must divide the {batch.pairs} pairs of a batch; got {together}",
    )
    pieces, shuffled = data.val_batch_size, data.validation_shuffle
    yield (
        pieces is None or (pieces >= 2 and pieces % 2 == 0 and not shuffled),
        "data.val_batch_size counts prompts, two for each pair, so it must be even, and data.validation_shuffle "
        f"False, or null; got {pieces} with data.validation_shuffle={shuffled}",
    )
    yield (
        data.get("gen_batch_size") in (None, batch.prompts),
        f"data.gen_batch_size must be null: a smaller fetch could split a pair; got {data.get('gen_batch_size')}",
    )


def _embedder_rules(config: Any, batch: BatchPlan, embedder: EmbedderConfig) -> Iterator[Rule]:
    train, strategy = embedder.train, embedder.strategy
    devices = embedder.nnodes * embedder.n_gpus_per_node or batch.devices
    split = embedder.tensor_model_parallel_size * embedder.pipeline_model_parallel_size
    yield (
        devices % split == 0,
        "embedrl.embedder.tensor_model_parallel_size x pipeline_model_parallel_size must divide the Embedder's "
        f"{devices} devices; got {split}",
    )
    chosen = batch.prompts // mini_batches(config) * (batch.rollouts if train.rollouts == "all" else 1)
    yield (
        not train.enable or chosen >= devices // split,
        f"co-training needs a row for each of the Embedder's {devices // split} data-parallel ranks; "
        f"embedrl.embedder.train.rollouts={train.rollouts} gives at most {chosen} of a batch",
    )
    yield (
        not (train.enable and train.lora_rank) or strategy != "fsdp",
        "adapters need FSDP2: PEFT's do not work under FSDP1. Set embedrl.embedder.strategy=fsdp2; "
        f"got fsdp with embedrl.embedder.train.lora_rank={train.lora_rank}",
    )
    yield (
        embedder.backend != "worker" or strategy == "fsdp2" or str(config.trainer.device) != "cpu",
        f"embedrl.embedder.strategy must be fsdp2 on a CPU; got {strategy}",
    )
    senders = int(config.actor_rollout_ref.rollout.agent.num_workers)
    yield (
        embedder.backend != "server" or embedder.server.limit >= senders,
        f"embedrl.embedder.server.limit is shared out among the {senders} agent-loop workers that send "
        f"(actor_rollout_ref.rollout.agent.num_workers), so it must be at least {senders}; "
        f"got {embedder.server.limit}",
    )


def _reward_rules(config: Any, embedrl: EmbedRLConfig) -> Iterator[Rule]:
    for key, (value, reason) in FIXED.items():
        found = OmegaConf.select(config, key)
        yield (
            found == value or (not value and not found),
            f"{key} must be {'null' if value is None else value}: {reason}; got {found}",
        )
    judge = config.reward.reward_model
    yield (
        not (judge.enable and embedrl.judge.urls),
        "the judge's servers are either verl's (reward.reward_model.enable=True) or embedrl.judge.urls; got both",
    )
    yield (
        not judge.enable or bool(judge.model_path),
        "reward.reward_model.enable=True starts a judge and needs reward.reward_model.model_path; got null",
    )
    yield (
        bool(config.reward.custom_reward_function.path),
        "reward.custom_reward_function.path must name a reward function (see reward/); got null",
    )


def has_judge(config: Any) -> bool:
    """Whether a run configuration names a judge."""
    return bool(config.reward.reward_model.enable or config.embedrl.judge.urls)


def no_megatron(family: str) -> str:
    """The refusal of a family that verl's Megatron engine cannot load."""
    return (
        f"verl 0.9.1's Megatron engine cannot load {family}: its weight converter has {', '.join(MEGATRON_TYPES)}. Use "
        "the FSDP recipe of that family"
    )
