# SPDX-License-Identifier: Apache-2.0
"""What gave the rewards of a run, written into every checkpoint and compared when it is resumed.

The Embedder, the evidence it sees, how prompts are written, and the reward function: none of them has a state that a
checkpoint would restore, and going on with another one would change the reward in silence. (Which data, in which order,
is in the data loader's own state.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.contrastive.run_folder import write_atomically
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.contract import load_reward_function

RECORD = "run.json"
# Keys that change where and how fast the Embedder runs, not its vectors.
_FREE = (
    *("strategy", "offload", "max_tokens_per_gpu", "attn_implementation", "nnodes", "n_gpus_per_node"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "path", "train", "backend", "server", "sentence"),
)
_OF_A_MODEL = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt")


def run_record(config: Any, embedrl: EmbedRLConfig) -> dict[str, dict[str, Any]]:
    """The record of a run, section by section, in JSON's types.

    Args:
        config: the whole run's.

    Raises:
        ConfigError: the reward function cannot be loaded.
    """
    named, data = config.reward.custom_reward_function, config.data
    prompts = {key: data[key] for key in ("max_prompt_length", "max_response_length", "filter_overlong_prompts")}
    record = {
        "embedrl.embedder": _embedder(embedrl.embedder),
        "embedrl.evidence": dataclasses.asdict(embedrl.evidence),
        "data.embedrl": dataclasses.asdict(DataSettings.from_config(data)) | prompts,
        "reward.custom_reward_function": {
            "function": f"{Path(str(named.path)).name}:{named.name}",
            "code": _code(f"{named.path}:{named.name}"),
            "reward_kwargs": OmegaConf.to_container(named.reward_kwargs, resolve=True) if named.reward_kwargs else {},
        },
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(record))  # tuples are lists, as they will be read
    return plain


def write_run_record(step_folder: str, record: Mapping[str, Any]) -> None:
    """Write `run.json` into a checkpoint folder (atomically)."""
    folder = Path(step_folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def check_run_record(step_folder: str, record: Mapping[str, Any]) -> None:
    """Refuse to resume with anything that would give other rewards than so far.

    Raises:
        ConfigError: the checkpoint has no record, or a part of it differs; the message names each with both values.
    """
    file = Path(step_folder) / RECORD
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: the checkpoint was not written by an EG-RL trainer of this version. Start a new run "
            "folder (trainer.default_local_dir)"
        )
    saved = json.loads(file.read_text())
    changed = []
    for section in sorted({*saved, *record}):
        before, now = dict(saved.get(section, {})), dict(record.get(section, {}))
        if section == "embedrl.embedder" and before.get("weights") == now.get("weights") is not None:
            before.pop("path", None), now.pop("path", None)  # the same files in another place
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                changed.append(f"{section}.{key} was {before.get(key)!r} and is {now.get(key)!r}")
    if changed:
        raise ConfigError(
            f"the run at {step_folder} cannot be resumed with other rewards: {'; '.join(changed)}. Resume with the "
            "same settings, or start a new run folder (trainer.default_local_dir)"
        )


def _embedder(config: EmbedderConfig) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    if config.backend == "sentence_transformers":  # its own prompts; the other backends give the same vectors
        settings["prompts"] = [config.sentence.query_prompt, config.sentence.target_prompt]
    train = config.train
    trained = {"average": train.ema_decay > 0, "lora": [train.lora_rank, train.lora_alpha]} if train.enable else None
    return {"path": config.path, "weights": model_digest(str(config.path)), "trained": trained, **settings}


def model_digest(path: str) -> str | None:
    """sha256 over every file of a model, whole; of a hub id those in the local cache, None where it has none."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    if not folder.is_dir():
        known = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        if not isinstance(known, str):
            return None
        folder = Path(known).parent
    files = sorted({file for pattern in _OF_A_MODEL for file in folder.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.name}:{_file_digest(file.resolve(), state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_digest(file: Path, size: int, modified: int) -> str:
    """Read once in a process while size and time stay the same: a model may have tens of gigabytes."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _code(spec: str) -> str:
    """sha256 of the file that the reward function is in."""
    function, _ = load_reward_function(spec)
    file = inspect.getsourcefile(inspect.unwrap(function))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
