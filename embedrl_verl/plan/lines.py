# SPDX-License-Identifier: Apache-2.0
"""What a plan says: its lines, topic by topic, from a configuration that has been checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.config.batch import SEPARATE, SIDES, BatchPlan, is_megatron, mini_batches, replica_size
from embedrl_verl.config.rules import COLOCATE, files_of, is_hub_id, missing_inputs
from embedrl_verl.data.run_files import local, pairs_by_source, steps_an_epoch
from embedrl_verl.platforms.needs import problems

Lines = list[tuple[str, str]]


def device_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> Lines:
    """Devices, and what runs on them."""
    import torch

    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    nodes, per_node = int(trainer.nnodes), int(trainer.n_gpus_per_node)
    on_cpu = str(trainer.device) == "cpu"
    unit = "CPU process" if on_cpu else "GPU"
    if on_cpu:
        devices = f"{_count(batch.devices, 'process')} on the CPU (gloo)"
    else:
        here = torch.cuda.device_count()
        others = _other_gpus(config, section)
        as_here = nodes == 1 and here == per_node + sum(others.values())
        known = "as here" if as_here else f"simulated: this machine has {here}"
        devices = f"{nodes} x {per_node} = {batch.devices} GPUs ({known})"
        if others:
            named = ", ".join(f"{count} for {what}" for what, count in others.items())
            devices += f" for training, {named}: {batch.devices + sum(others.values())} in all"
    engine = str(actor.strategy)
    if is_megatron(config):
        mesh = actor.megatron
        engine = (
            f"Megatron, TP {mesh.tensor_model_parallel_size} x PP {mesh.pipeline_model_parallel_size} x "
            f"CP {mesh.context_parallel_size}"
        )
    return [
        ("devices", devices),
        ("actor", f"{engine}, {_count(batch.data_parallel, 'data-parallel rank')}"),
        ("rollout", _rollout(config, batch, unit)),
        ("mode", _mode(config)),
        ("embedder", _embedder(section, batch, unit)),
    ]


def _other_gpus(config: Any, section: EmbedRLConfig) -> dict[str, int]:
    """GPUs that the run needs beside those of training, by what for."""
    rollout, judge, embedder = config.actor_rollout_ref.rollout, config.reward.reward_model, section.embedder
    server = embedder.server
    apart, judged = config.trainer.v1.trainer_mode == SEPARATE, judge.enable and judge.enable_resource_pool
    embeds = {
        "worker": embedder.nnodes * embedder.n_gpus_per_node,
        "server": 0 if server.urls else server.servers * server.n_gpus_per_server,
        "sentence_transformers": embedder.sentence.n_gpus,
    }
    found = {
        "rollouts": int(rollout.nnodes) * int(rollout.n_gpus_per_node) if apart else 0,
        "the judge": int(judge.nnodes) * int(judge.n_gpus_per_node) if judged else 0,
        "the Embedder": embeds[embedder.backend],
    }
    return {what: count for what, count in found.items() if count}


def _embedder(section: EmbedRLConfig, batch: BatchPlan, unit: str) -> str:
    embedder, train, server = section.embedder, section.embedder.train, section.embedder.server
    if embedder.backend == "server":
        servers = f"{_count(server.servers, 'vLLM server')} of {_count(server.n_gpus_per_server, 'GPU')}, a pool apart"
        where = ", ".join(server.urls) or servers
        return f"frozen; {where}, {_count(server.limit, 'request')} at a time, while rollouts run"
    if embedder.backend == "sentence_transformers":
        gpus = _count(embedder.sentence.n_gpus, "GPU")
        return f"frozen; sentence-transformers in one process on {gpus}, while rollouts run"
    own = embedder.nnodes * embedder.n_gpus_per_node
    where = f"{_count(own, unit)} of its own" if own else f"{_count(batch.devices, 'process')} on the actor's devices"
    trained = "frozen"
    if train.enable:
        weights = f"LoRA {train.lora_rank}/{train.lora_alpha}" if train.lora_rank else "all weights"
        trained = (
            f"co-trained every {_count(train.every, 'step')} ({weights}, lr {train.lr:g}, {train.rollouts} rollouts)"
        )
    return (
        f"{trained}; {embedder.strategy}, {where}, {embedder.dtype}, at most {embedder.max_tokens_per_gpu} tokens "
        "a micro-batch" + (", offloaded between uses" if embedder.offload else "")
    )


def _rollout(config: Any, batch: BatchPlan, unit: str) -> str:
    rollout, size = config.actor_rollout_ref.rollout, replica_size(config.actor_rollout_ref.rollout)
    places = []
    if config.trainer.v1.trainer_mode == SEPARATE:
        own = int(rollout.nnodes) * int(rollout.n_gpus_per_node)
        places.append(f"{_count(own // size, 'replica')} of {_count(size, unit)}, on {_count(own, unit)} of its own")
    if config.actor_rollout_ref.hybrid_engine:
        places.append(f"{_count(batch.devices // size, 'replica')} of {_count(size, unit)}")
    return f"{rollout.name}, {'; '.join(places)}"


def _mode(config: Any) -> str:
    v1 = config.trainer.v1
    mode, threshold = str(v1.trainer_mode), v1.sampler.max_off_policy_threshold
    if mode not in (COLOCATE, SEPARATE):
        return mode
    limit = f"staleness at {threshold}: {v1.sampler.max_off_policy_strategy}"
    if threshold is None:
        limit = "no limit on staleness"
    every = f", new weights for the rollout after every {_count(mini_batches(config), 'update')}"
    return f"{mode}, {limit}{every if mode == SEPARATE else ''}"


def batch_lines(config: Any, batch: BatchPlan) -> Lines:
    """The arithmetic of a step."""
    parts = mini_batches(config)  # each is rewarded by itself
    side = batch.pairs * batch.rollouts // parts
    fraction, left = divmod(batch.rows, batch.data_parallel)
    return [
        (
            "batch",
            f"{batch.pairs} pairs x {SIDES} sides = {batch.prompts} prompts, x {batch.rollouts} rollouts = "
            f"{batch.rows} rows a step, {fraction}{'+' if left else ''} a rank",
        ),
        (
            "updates",
            f"{batch.updates} a step: {batch.mini_prompts} prompts = {batch.mini_rows} rows each, "
            f"{batch.mini_rows // batch.data_parallel} a rank",
        ),
        (
            "reward",
            ("" if parts == 1 else f"{parts} batches of {batch.pairs // parts} pairs, each ")
            + f"{side} x {side} similarities a direction, {batch.prompts // parts} GRPO groups of {batch.rollouts}",
        ),
        (
            "lengths",
            f"prompt up to {config.data.max_prompt_length}, response up to {config.data.max_response_length} tokens",
        ),
    ]


def training_lines(config: Any) -> Lines:
    """Optimiser, reward function and judge."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    function, steps = config.reward.custom_reward_function, config.trainer.total_training_steps
    kl = f"{actor.kl_loss_coef} ({actor.kl_loss_type})" if actor.use_kl_loss else "off"
    kwargs = ", ".join(f"{key}={value}" for key, value in (function.reward_kwargs or {}).items())
    length = _count(config.trainer.total_epochs, "epoch") if steps is None else _count(steps, "step")
    return [
        (
            "optimiser",
            f"lr {actor.optim.lr}, clip {actor.clip_ratio}, KL loss {kl}, temperature {rollout.temperature}, {length}",
        ),
        ("reward function", f"{function.path}:{function.name}({kwargs}), tried on a made-up batch"),
        ("judge", _judge(config)),
    ]


def _judge(config: Any) -> str:
    judge, served = config.embedrl.judge, config.reward.reward_model
    if not judge.urls and not served.enable:
        return "none"
    where = ", ".join(judge.urls)
    if not judge.urls:
        own = f"{served.nnodes} x {served.n_gpus_per_node} devices of its own"
        place = own if served.enable_resource_pool else "on the actor's devices, by turns"
        where = f"{_folder(served.model_path)}, {place}"
    return f"{where}, {_count(judge.limit, 'request')} at a time"


def file_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig, family: str | None) -> Lines:
    """Models, data and where checkpoints go."""
    lines = [
        ("reasoner", f"{_folder(config.actor_rollout_ref.model.path)}, family {family or 'known when it is loaded'}"),
        ("embedder model", f"{_folder(section.embedder.path)}, profile {_profile(section)}"),
    ]
    some_here = False
    for topic, key in (("training pairs", "data.train_files"), ("validation pairs", "data.val_files")):
        here = {file: pairs_by_source(path) for file in files_of(config, key) if (path := local(file))}
        named = [
            f"{file} ({f'{here[file].total()} pairs' if file in here else 'not found here'})"
            for file in files_of(config, key)
        ]
        described, some_here = "; ".join(named), some_here or bool(here)
        if key == "data.train_files" and len(here) == len(named) > 0:
            described += f" = {steps_an_epoch(sum(here.values(), Counter()), config)} steps an epoch"
        lines.append((topic, described or "none"))
    root = config.data.media_root
    none = "none: media of the first rows are bytes" if some_here else "none is set"
    lines.append(("media root", none if root is None else _folder(root)))
    return [*lines, ("checkpoints", str(config.trainer.default_local_dir))]


def _profile(section: EmbedRLConfig) -> str:
    """As the run will resolve it, where the folder is here."""
    from embedrl_verl.embedder.profiles import resolve_profile
    from embedrl_verl.embedder.sentence import has_profile

    path, named = section.embedder.path, section.embedder.profile
    if named != "auto":
        return named
    if not Path(path).expanduser().is_dir():
        return "auto: looked at when the run starts"
    if section.embedder.backend == "sentence_transformers" and not has_profile(section.embedder):
        return "auto: none, the model's own prompts"
    return f"auto: {resolve_profile(path, named).name}"


def needs_lines(config: Any) -> Lines:
    """What this machine lacks for the run: packages, files, folders. A plan may be made on another machine, so nothing
    is refused."""
    found = [*problems(config), *missing_inputs(config)]
    state = f"lacks {len(found)}:" if found else "has every package, file and folder that the run needs"
    return [("this machine", state), *(("", line) for line in found)]


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _folder(path: object) -> str:
    text = str(path)
    if Path(text).expanduser().is_dir():
        return text
    return f"{text} (not a folder here" + (": a hub id)" if is_hub_id(text) else ")")
