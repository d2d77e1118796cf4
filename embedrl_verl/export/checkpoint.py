# SPDX-License-Identifier: Apache-2.0
"""What lies in a checkpoint folder: which model it is, how its weights are stored, where its configuration is.

| storage | weights | configuration and tokenizer |
|---|---|---|
| `fsdp` | `model_world_size_W_rank_R.pt`, one a rank | `huggingface/` |
| `files` | `huggingface/*.safetensors`, or Megatron's `model/huggingface/*.safetensors` | the same folder |
| `megatron` | `model/dist_ckpt/` | `model/huggingface/` |

A step folder `global_step_N` holds several checkpoints: the Reasoner in `actor`, an Embedder in `embedder`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from embedrl_verl.errors import ConfigError
from embedrl_verl.export.record import EMBEDDER_STAGES, REASONER_STAGES, TrainingRecord, read_record

Kind = Literal["embedder", "reasoner"]
Storage = Literal["fsdp", "files", "megatron"]
_STEP = re.compile(r"global_step_(\d+)")
_FOLDERS: dict[str, Kind] = {"actor": "reasoner", "embedder": "embedder"}


@dataclass(frozen=True)
class Checkpoint:
    """One model of a training run.

    Attributes:
        folder: where its shards lie.
        kind: what the model is.
        storage: how its weights are stored.
        huggingface: folder with config.json and the tokenizer's and processor's files.
        record: what `training.json` says; None without the file.
        step: training step by the record or the step folder's name; None = unknown.
    """

    folder: Path
    kind: Kind
    storage: Storage
    huggingface: Path
    record: TrainingRecord | None
    step: int | None


def find_checkpoint(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Look at a checkpoint folder, or into a step folder.

    Args:
        path: a checkpoint or a `global_step_N` folder.
        kind: embedder or reasoner; None = as the folder's name (`actor`, `embedder`) or training.json's stage tells.

    Raises:
        ConfigError: no such folder, no configuration or weights in it, or a kind that cannot be told.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"kind must be {' or '.join(get_args(Kind))}; got {kind!r}")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"a checkpoint is a folder; {folder} is none. Name a folder such as .../global_step_40/actor")
    inner = {_FOLDERS[name]: folder / name for name in _FOLDERS if (folder / name).is_dir()}
    if inner and not _storage(folder):
        if kind is None and len(inner) > 1:
            raise ConfigError(f"{folder} holds an actor and an embedder; say which with --kind reasoner or embedder")
        if kind is not None and kind not in inner:
            raise ConfigError(f"{folder} holds no {kind}, only: {', '.join(path.name for path in inner.values())}")
        folder = inner[kind] if kind in inner else next(iter(inner.values()))
    storage = _storage(folder)
    if storage is None:
        raise ConfigError(
            f"{folder} has no weights: neither model_world_size_*_rank_*.pt nor huggingface/*.safetensors nor "
            "model/dist_ckpt. Save 'model' in checkpoint.save_contents, or name another folder"
        )
    huggingface = folder / "huggingface" if storage == "fsdp" or _has_files(folder / "huggingface") else None
    huggingface = huggingface or folder / "model" / "huggingface"
    if not (huggingface / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no {huggingface.relative_to(folder)}/config.json, which verl writes beside the weights; "
            "copy that folder from another step of the same run"
        )
    record = read_record(folder)
    return Checkpoint(folder, _kind(folder, kind, record), storage, huggingface, record, _step(folder, record))


def _storage(folder: Path) -> Storage | None:
    if any(folder.glob("model_world_size_*_rank_*.pt")):
        return "fsdp"
    if _has_files(folder / "huggingface") or _has_files(folder / "model" / "huggingface"):
        return "files"
    return "megatron" if (folder / "model" / "dist_ckpt").is_dir() or (folder / "dist_ckpt").is_dir() else None


def _has_files(huggingface: Path) -> bool:
    return any(huggingface.glob("*.safetensors"))


def _step(folder: Path, record: TrainingRecord | None) -> int | None:
    if record is not None and record.step is not None:
        return record.step
    named = (_STEP.fullmatch(path.name) for path in (folder.resolve(), folder.resolve().parent))
    return next((int(match[1]) for match in named if match), None)


def _kind(folder: Path, kind: str | None, record: TrainingRecord | None) -> Kind:
    if kind is not None:
        return "embedder" if kind == "embedder" else "reasoner"
    name = folder.resolve().name
    if name in _FOLDERS:
        return _FOLDERS[name]
    if record is not None and record.stage in EMBEDDER_STAGES:
        return "embedder"
    if record is not None and record.stage in REASONER_STAGES:
        return "reasoner"
    raise ConfigError(
        f"{folder}: neither the folder's name (actor, embedder) nor a training.json tells what the model is; "
        "add --kind embedder or --kind reasoner"
    )
