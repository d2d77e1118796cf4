# SPDX-License-Identifier: Apache-2.0
"""What a plan says: the lines of `embedrl_verl.plan`, topic by topic, from a configuration that has been checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.data.files import pair_files
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.plan.batch import SIDES, BatchPlan
from embedrl_verl.platforms.needs import problems
from embedrl_verl.trainer.checks_async import COLOCATE, SEPARATE, mini_batches, replica_size


def is_megatron(config: Any) -> bool:
    """Whether the actor is on verl's Megatron engine."""
    return str(config.actor_rollout_ref.actor.strategy) == "megatron"


def device_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig) -> list[tuple[str, str]]:
    """Devices, and what runs on them."""
    import torch

    actor = config.actor_rollout_ref.actor
    nodes, per_node = int(config.trainer.nnodes), int(config.trainer.n_gpus_per_node)
    if str(config.trainer.device) == "cpu":
        devices = f"{_count(batch.devices, 'process')} on the CPU (gloo)"
        unit = "CPU process"
    else:
        here = torch.cuda.device_count()
        known = "as here" if nodes == 1 and here == per_node else f"simulated: this machine has {here}"
        devices = f"{nodes} x {per_node} = {batch.devices} GPUs ({known})"
        others = _other_gpus(config, section)
        if others:
            named = ", ".join(f"{count} for {what}" for what, count in others.items())
            devices += f" for training, {named}: {batch.devices + sum(others.values())} in all"
        unit = "GPU"
    if is_megatron(config):
        mesh = actor.megatron
        engine = (
            f"Megatron, TP {mesh.tensor_model_parallel_size} x PP {mesh.pipeline_model_parallel_size} x "
            f"CP {mesh.context_parallel_size}, {_count(batch.data_parallel, 'data-parallel rank')}"
        )
    else:
        engine = f"{actor.strategy}, {_count(batch.data_parallel, 'data-parallel rank')}"
    return [
        ("devices", devices),
        ("actor", engine),
        ("rollout", _rollout(config, batch, unit)),
        ("mode", _mode(config)),
        ("embedder", _embedder(section, batch, unit)),
    ]


def _other_gpus(config: Any, section: EmbedRLConfig) -> dict[str, int]:
    """GPUs that the run needs beside those of training, by what for."""
    rollout, judge, embedder = config.actor_rollout_ref.rollout, config.reward.reward_model, section.embedder
    found = {}
    if config.trainer.v1.trainer_mode == SEPARATE:
        found["rollouts"] = int(rollout.nnodes) * int(rollout.n_gpus_per_node)
    if judge.enable and judge.enable_resource_pool:
        found["the judge"] = int(judge.nnodes) * int(judge.n_gpus_per_node)
    if embedder.backend == "worker":
        found["the Embedder"] = embedder.nnodes * embedder.n_gpus_per_node
    elif embedder.backend == "server" and not embedder.server.urls:
        found["the Embedder"] = embedder.server.servers * embedder.server.n_gpus_per_server
    elif embedder.backend == "sentence_transformers":
        found["the Embedder"] = embedder.sentence.n_gpus
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
    own_devices = embedder.nnodes * embedder.n_gpus_per_node
    where = f"{_count(batch.devices, 'process')} on the actor's devices"
    if own_devices:
        where = f"{_count(own_devices, unit)} of its own"
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
    if v1.trainer_mode not in (COLOCATE, SEPARATE):
        return str(v1.trainer_mode)
    threshold = v1.sampler.max_off_policy_threshold
    limit = (
        "no limit on staleness"
        if threshold is None
        else f"staleness at {threshold}: {v1.sampler.max_off_policy_strategy}"
    )
    every = ""
    if v1.trainer_mode == SEPARATE:
        every = (
            f", new weights for the rollout after every {_count(int(v1.separate_async.parameter_sync_step), 'update')}"
        )
    return f"{v1.trainer_mode}, {limit}{every}"


def batch_lines(config: Any, batch: BatchPlan) -> list[tuple[str, str]]:
    """The arithmetic of a step."""
    parts = mini_batches(config)  # each is rewarded by itself
    side = batch.pairs * batch.rollouts // parts
    share, left = divmod(batch.rows, batch.data_parallel)
    return [
        (
            "batch",
            f"{batch.pairs} pairs x {SIDES} sides = {batch.prompts} prompts, x {batch.rollouts} rollouts = "
            f"{batch.rows} rows a step, {share}{'+' if left else ''} a rank",
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


def training_lines(config: Any) -> list[tuple[str, str]]:
    """Optimiser, reward function and judge."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    function = config.reward.custom_reward_function
    kl = f"{actor.kl_loss_coef} ({actor.kl_loss_type})" if actor.use_kl_loss else "off"
    kwargs = ", ".join(f"{key}={value}" for key, value in (function.reward_kwargs or {}).items())
    steps = config.trainer.total_training_steps
    length = _count(steps, "step") if steps is not None else _count(config.trainer.total_epochs, "epoch")
    return [
        (
            "optimiser",
            f"lr {actor.optim.lr}, clip {actor.clip_ratio}, KL loss {kl}, temperature {rollout.temperature}, {length}",
        ),
        ("reward function", f"{function.path}:{function.name}({kwargs})"),
        ("judge", _judge(config)),
    ]


def _judge(config: Any) -> str:
    judge, served = config.embedrl.judge, config.reward.reward_model
    if judge.urls:
        return f"{', '.join(judge.urls)}, {_count(judge.limit, 'request')} at a time"
    if not served.enable:
        return "none"
    own = f"{served.nnodes} x {served.n_gpus_per_node} devices of its own"
    where = own if served.enable_resource_pool else "on the actor's devices, by turns"
    return f"{_folder(served.model_path)}, {where}, {_count(judge.limit, 'request')} at a time"


def file_lines(config: Any, batch: BatchPlan, section: EmbedRLConfig, family: str | None) -> list[tuple[str, str]]:
    """Models, data and where checkpoints go."""
    lines = [
        ("reasoner", f"{_folder(config.actor_rollout_ref.model.path)}, family {family or 'known when it is loaded'}"),
        ("embedder model", f"{_folder(section.embedder.path)}, profile {_profile(section)}"),
    ]
    for topic, key in (("training pairs", "train_files"), ("validation pairs", "val_files")):
        value = config.data[key]
        files = [value] if isinstance(value, str) else list(value or [])
        counts = [_pairs_in(file) for file in files]
        total = sum(count for count in counts if count is not None)
        described = "; ".join(
            f"{file} ({'not found here' if count is None else f'{count} pairs'})"
            for file, count in zip(files, counts, strict=True)
        )
        if topic == "training pairs" and total and None not in counts:
            described += f" = {total // batch.pairs} steps an epoch"
        lines.append((topic, described or "none"))
    root = config.data.media_root
    lines.append(("media root", "none: media are bytes in the rows" if root is None else _folder(root)))
    lines.append(("checkpoints", str(config.trainer.default_local_dir)))
    return lines


def _profile(section: EmbedRLConfig) -> str:
    """As the run will resolve it, where the folder is here."""
    from embedrl_verl.embedder.profiles import resolve_profile

    path, named = str(section.embedder.path), section.embedder.profile
    if named != "auto" or section.embedder.backend != "worker" or not Path(path).expanduser().is_dir():
        return named
    return f"auto: {resolve_profile(path, named).name}"


def needs_lines(config: Any) -> list[tuple[str, str]]:
    """What this machine lacks for the run. A plan may be made on another machine, so nothing is refused."""
    found = problems(config)
    return [("this machine", "has every package that the run needs" if not found else f"lacks {len(found)}:")] + [
        ("", line) for line in found
    ]


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _folder(path: object) -> str:
    text = str(path)
    if Path(text).expanduser().is_dir():
        return text
    return f"{text} (not a folder here" + (": a hub id)" if text.count("/") == 1 and text[0] not in "./~" else ")")


def _pairs_in(file: str) -> int | None:
    """Rows of a parquet file or of a data set folder's parts, None when it is not there.

    Raises:
        ConfigError: a file is not parquet, or the folder is no finished data set.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(file).expanduser()
    if not path.exists():
        return None
    rows = 0
    try:
        for part in pair_files([path]):
            path = part
            rows += int(pq.read_metadata(part).num_rows)
    except DataError as error:
        raise ConfigError(str(error)) from error
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path} must be a parquet file of pair records; it cannot be read: {error}") from error
    return rows
