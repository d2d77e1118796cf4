# SPDX-License-Identifier: Apache-2.0
"""What gave the rewards of a run, written into every checkpoint and compared when it is resumed.

The Embedder, the evidence it sees, how prompts are written, the judge, and the reward function: none of them has a
state that a checkpoint would restore, and going on with another one would change the reward in silence. (Which data, in
which order, is in the data loader's own state.) The record is made once, when a run starts, of what it has loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl import rewards
from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.disk import sha256_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError

RECORD = "run.json"
# Keys that change where and how fast the Embedder runs, not its vectors.
_FREE = (
    *("strategy", "offload", "max_tokens_per_gpu", "attn_implementation", "nnodes", "n_gpus_per_node"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "path", "train", "backend", "server", "sentence"),
)
_OF_THE_JUDGE = (
    *("model", "style", "images", "hard_pairs", "shared_lists", "constrained", "max_tokens", "temperature"),
    *("seed", "extra_body"),
)
_WEIGHTS = ("*.safetensors", "*.bin")
_BESIDE = (
    *("config.json", "tokenizer*", "*.jinja", "*processor_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "modules.json", "adapter_config.json", "chat_template.json"),
    # A sentence-transformers model's own prompts, and the longest text that it reads.
    *("config_sentence_transformers.json", "sentence_*_config.json"),
)


def run_record(config: Any, embedrl: EmbedRLConfig) -> dict[str, dict[str, Any]]:
    """The record of a run, section by section, in JSON's types.

    Args:
        config: the whole run's.

    Raises:
        ConfigError: the file of the reward function is not there.
    """
    named, data = config.reward.custom_reward_function, config.data
    prompts = {key: data[key] for key in ("max_prompt_length", "max_response_length", "filter_overlong_prompts")}
    record = {
        "embedrl.embedder": _embedder(embedrl.embedder),
        "embedrl.evidence": dataclasses.asdict(embedrl.evidence),
        "data.embedrl": dataclasses.asdict(DataSettings.from_config(data)) | prompts,
        "embedrl.judge": _judge(config, embedrl),
        "actor_rollout_ref.rollout": {
            key: config.actor_rollout_ref.rollout[key] for key in ("n", "temperature", "top_p")
        },
        "reward.custom_reward_function": {
            "function": named.name,
            "code": _code(str(named.path)),
            "package": _package_code(),
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
        digests = before.get("weights"), now.get("weights")
        if None in digests:  # not here then or now: the path is all that is known
            before.pop("weights", None), now.pop("weights", None)
        elif digests[0] == digests[1]:  # the same files, wherever they are
            before.pop("path", None), now.pop("path", None)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                changed.append(f"{section}.{key} was {before.get(key)!r} and is {now.get(key)!r}")
    if changed:
        raise ConfigError(
            f"the run at {step_folder} cannot be resumed with other rewards: {'; '.join(changed)}. Resume with the "
            f"same settings, or start a new run folder (trainer.default_local_dir); if you mean it, edit {file}"
        )


def _embedder(config: EmbedderConfig) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    if config.backend == "sentence_transformers":  # its own prompts; the other backends give the same vectors
        settings["prompts"] = [config.sentence.query_prompt, config.sentence.target_prompt]
    if config.backend == "server":  # text of longer rows is cut
        settings["server.max_model_len"] = config.server.max_model_len
    train = config.train
    trained = {"average": train.ema_decay > 0, "lora": [train.lora_rank, train.lora_alpha]} if train.enable else None
    return {"path": config.path, "weights": model_digest(str(config.path)), "trained": trained, **settings}


def _judge(config: Any, embedrl: EmbedRLConfig) -> dict[str, Any]:
    """Empty without a judge."""
    served = config.reward.reward_model
    if not served.enable and not embedrl.judge.urls:
        return {}
    settings = {name: getattr(embedrl.judge, name) for name in _OF_THE_JUDGE}
    path = str(served.model_path) if served.enable else None
    return {"path": path, "weights": path and model_digest(path), **settings}


def model_digest(path: str) -> str | None:
    """Of every file of a model that its answers depend on, each read whole: sha256 (of a hub id in the local cache: its
    commit). None where there is nothing here.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    if not folder.is_dir():
        known = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        return f"commit {Path(known).parent.name}" if isinstance(known, str) else None
    # sentence-transformers keeps a folder for each of its modules.
    pattern = "**/" if (folder / "modules.json").is_file() else ""
    files = {file for name in (*_WEIGHTS, *_BESIDE) for file in folder.glob(pattern + name) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _code(path: str) -> str:
    """sha256 of the file that a reward function is in (a file, file://FILE or pkg://module)."""
    if path.startswith("pkg://"):
        found = importlib.util.find_spec(path.removeprefix("pkg://").strip("/").replace("/", "."))
        file = Path(found.origin) if found is not None and found.origin else None
    else:
        file = Path(path.removeprefix("file://")).expanduser()
    if file is None or not file.is_file():
        raise ConfigError(f"reward.custom_reward_function.path: no such file or module: {path}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _package_code() -> str:
    """sha256 of this package's reward maths, which ready-made functions and many own ones call."""
    digest = hashlib.sha256()
    for file in sorted(Path(rewards.__file__).parent.rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
