# SPDX-License-Identifier: Apache-2.0
"""Which Embedder gave the rewards, written into every checkpoint and checked when a run resumes.

A frozen Embedder has no state of its own to save, but continuing with another one would change the reward in silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.contrastive.run_folder import write_atomically
from embedrl_verl.errors import ConfigError

RECORD = "embedder.json"
# Keys that change where and how fast the Embedder runs, not its vectors.
_FREE = (
    *("strategy", "offload", "max_tokens_per_gpu", "attn_implementation", "nnodes", "n_gpus_per_node"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "path", "train", "backend", "server", "sentence"),
)


def _weights_digest(path: str) -> str | None:
    """sha256 over the names, sizes and first megabytes of the weight files; None for a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(4 << 20))
    return digest.hexdigest()


def _record(config: EmbedderConfig) -> dict[str, object]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    train = config.train
    if config.backend == "sentence_transformers":  # its own prompts; the other backends give the same vectors
        settings["prompts"] = [config.sentence.query_prompt, config.sentence.target_prompt]
    if train.enable:
        settings["trained"] = {"average": train.ema_decay > 0, "lora": [train.lora_rank, train.lora_alpha]}
    return {"path": config.path, "weights": _weights_digest(str(config.path)), "settings": settings}


def write_embedder_record(step_folder: str, config: EmbedderConfig) -> None:
    """Write `embedder.json` into a checkpoint folder (atomically)."""
    folder = Path(step_folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(_record(config), indent=2))


def check_embedder_record(step_folder: str, config: EmbedderConfig) -> None:
    """Refuse to resume with another Embedder than the one that gave the rewards so far.

    Raises:
        ConfigError: the checkpoint has no record, or its weights or settings differ from the run's.
    """
    file = Path(step_folder) / RECORD
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: the checkpoint was not written by an EG-RL trainer. Start a new run folder"
        )
    saved, now = json.loads(file.read_text()), _record(config)
    saved["settings"] = {name: value for name, value in saved["settings"].items() if name not in _FREE}
    same_weights = saved["weights"] == now["weights"] if now["weights"] else saved["path"] == now["path"]
    if same_weights and saved["settings"] == now["settings"]:
        return
    raise ConfigError(
        f"the run at {step_folder} was rewarded by the Embedder {saved['path']} with {saved['settings']}, but "
        f"embedrl.embedder is now {now['path']} with {now['settings']}. Resume with the same Embedder, or start anew"
    )
