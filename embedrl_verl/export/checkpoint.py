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
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.record import TrainingRecord, read_record

Kind = Literal["embedder", "reasoner"]
Storage = Literal["fsdp", "files", "megatron"]
_STEP = re.compile(r"global_step_(\d+)")
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file that names the last complete checkpoint of a folder of checkpoints."""
WRITING = ".writing"
"""In the folder of a step from its first file to the tracker's."""
_FOLDERS: dict[str, Kind] = {"actor": "reasoner", "embedder": "embedder"}
_STAGES: dict[str | None, Kind] = {
    **dict.fromkeys(("contrastive", "embedder"), "embedder"),
    **dict.fromkeys(("sft", "rl", "egrl", "eg_rl", "grpo", "reasoner"), "reasoner"),
}


@dataclass(frozen=True)
class Checkpoint:
    """One model of a training run.

    Attributes:
        folder: where its shards lie.
        kind: what the model is.
        storage: how its weights are stored.
        huggingface: folder with config.json and the tokenizer's and processor's files.
        record: what `training.json` says; empty without the file.
        step: training step by the record or the step folder's name; None = unknown.
    """

    folder: Path
    kind: Kind
    storage: Storage
    huggingface: Path
    record: TrainingRecord
    step: int | None


def find_checkpoint(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Look at a checkpoint folder, or into a step folder.

    Args:
        path: a checkpoint or a `global_step_N` folder.
        kind: embedder or reasoner; None = as the folder's name (`actor`, `embedder`) or training.json's stage tells.
    """
    if kind not in (None, *_FOLDERS.values()):
        raise ConfigError(f"kind must be embedder or reasoner; got {kind!r}")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"a checkpoint is a folder; {folder} is none. Name a folder such as .../global_step_40/actor")
    inner: dict[str, Path] = {what: folder / name for name, what in _FOLDERS.items() if (folder / name).is_dir()}
    if inner and not _weights(folder):
        if kind is None and len(inner) > 1:
            raise ConfigError(f"{folder} holds an actor and an embedder; say which with --kind reasoner or embedder")
        if kind is not None and kind not in inner:
            raise ConfigError(f"{folder} holds no {kind}, only: {', '.join(path.name for path in inner.values())}")
        folder = inner[next(iter(inner)) if kind is None else kind]
    weights = _weights(folder)
    if weights is None:
        raise ConfigError(
            f"{folder} has no weights: neither model_world_size_*_rank_*.pt nor huggingface/*.safetensors nor "
            "model/dist_ckpt. Save 'model' in checkpoint.save_contents, or name another folder"
        )
    storage, huggingface = weights
    if not (huggingface / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no {huggingface.relative_to(folder)}/config.json, which verl writes beside the weights; "
            "copy that folder from another step of the same run"
        )
    record = read_record(folder) or TrainingRecord()
    known = kind or _FOLDERS.get(folder.resolve().name) or _STAGES.get(record.stage)
    if known is None:
        raise ConfigError(
            f"{folder}: neither the folder's name (actor, embedder) nor a training.json tells what the model is; "
            "add --kind embedder or --kind reasoner"
        )
    named = (_STEP.fullmatch(part.name) for part in (folder.resolve(), folder.resolve().parent))
    step = next((int(match[1]) for match in named if match), None) if record.step is None else record.step
    return Checkpoint(folder, "embedder" if known == "embedder" else "reasoner", storage, huggingface, record, step)


def _weights(folder: Path) -> tuple[Storage, Path] | None:
    """How the weights are stored, and the folder of their configuration."""
    megatron = folder / "model" / "huggingface"
    if any(folder.glob("model_world_size_*_rank_*.pt")):
        return "fsdp", folder / "huggingface"
    for huggingface in (folder / "huggingface", megatron):
        if any(huggingface.glob("*.safetensors")):
            return "files", huggingface
    return ("megatron", megatron) if (folder / "model" / "dist_ckpt").is_dir() else None


def last_complete_step(checkpoints: Path) -> int | None:
    """The step that the tracker file names; None before the first."""
    tracker = checkpoints / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text else None  # empty: killed while it was written


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Mark the folder of a step while it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WRITING).touch()
    yield
    (folder / WRITING).unlink()


def make_way(folder: Path) -> None:
    """Remove the folder of a step that is about to be written, where a run that went back behind an earlier one comes
    to it: the tracker must not name what is half written, and `best/` has hard links to files that would be written
    anew in place. The tracker then names the step before that has weights. Links stay."""
    if not folder.is_dir() or folder.is_symlink():
        return
    tracker = folder.parent / TRACKER
    if folder.name == f"global_step_{last_complete_step(folder.parent)}":
        steps = complete_steps(folder.parent).items()
        earlier = [n for n, path in steps if path != folder and any((path / part).is_dir() for part in _FOLDERS)]
        if earlier:
            write_atomically(tracker, str(earlier[-1]))
        else:
            tracker.unlink()
    shutil.rmtree(folder)


def remove_half_written(checkpoints: Path) -> list[Path]:
    """Remove the steps in whose `writing` a run ended. The one that the tracker names is complete and loses its mark;
    links, and what has no mark, stay."""
    last = last_complete_step(checkpoints)
    marks = [mark for mark in sorted(checkpoints.glob(f"global_step_*/{WRITING}")) if not mark.parent.is_symlink()]
    removed = [mark.parent for mark in marks if mark.parent.name != f"global_step_{last}"]
    for folder in removed:
        shutil.rmtree(folder)
    for mark in marks:
        mark.unlink(missing_ok=True)
    return removed


def complete_steps(checkpoints: Path) -> dict[int, Path]:
    """Folders of the complete steps, oldest first. Later ones are still being written, or belong to a run that was gone
    back behind. Links are not among them."""
    newest = last_complete_step(checkpoints)
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("global_step_*")
        if (match := _STEP.fullmatch(path.name)) and not path.is_symlink()
    }
    return {step: steps[step] for step in sorted(steps) if newest is not None and step <= newest}
