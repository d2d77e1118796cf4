# SPDX-License-Identifier: Apache-2.0
"""`training.json`: what a training stage writes about itself beside its checkpoint, and the model card repeats.

    {"stage": "contrastive", "step": 400, "base_model": "Qwen/Qwen2-VL-2B-Instruct",
     "data": ["train.parquet", {"source": "birds", "pairs": 1200}],
     "settings": {"learning_rate": 1e-5}, "scores": {"hit@1": 0.81}}

Every key may be absent; absent means unknown. `public_text` keeps machine paths out of what is published.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from embedrl_verl.config.schema import MediaConfig, yaml_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError

RECORD_FILE = "training.json"
OF_EMBEDDER = (
    *("profile", "max_text_tokens", "image_min_tokens", "image_max_tokens", "frame_min_tokens", "frame_max_tokens"),
)
"""Keys of `embedrl.embedder` that an Embedder's record has: how it was prompted, and the sizes it was trained with."""
_STARTS = ("/", "~", "./", "../", "file://")
_WORD = r"[^\s/,;:='\"|()\[\]]+"
# One slash is a hub id unless it names a file; two and more are a path.
_RELATIVE = re.compile(rf"{_WORD}/(?:{_WORD}\.(?:parquet|jsonl?|csv|pt|safetensors|ya?ml)|{_WORD}/\S*)")
_PATH = re.compile(rf"(?<![\w:/.])(?:file://)?(?:~|\.{{1,2}})?/(?:{_WORD}/)*({_WORD})/?")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\\\s]+\\)*([^\\\s]+)\\?")


class DataSource(NamedTuple):
    """A source of the training data; `pairs` None = unknown."""

    source: str
    pairs: int | None = None


class TrainingRecord(BaseModel):
    """The content of a `training.json`; empty or None where it says nothing."""

    model_config = ConfigDict(strict=True)

    stage: str | None = None
    step: int | None = None
    base_model: str | None = None
    data: tuple[str | DataSource, ...] = ()
    settings: dict[str, Any] = {}
    scores: dict[str, float] = {}


def read_record(folder: Path) -> TrainingRecord | None:
    """The record in a checkpoint folder or in its parent; None if neither has one. A checkpoint's `huggingface`, or
    `model/huggingface`, is looked at as the checkpoint."""
    outer = folder.resolve()
    for name in ("huggingface", "model"):
        outer = outer.parent if outer.name == name else outer
    for file in (folder / RECORD_FILE, outer / RECORD_FILE, outer.parent / RECORD_FILE):
        if file.is_file():
            try:
                return TrainingRecord.model_validate_json(file.read_bytes())
            except ValidationError as error:
                wrong = error.errors()[0]
                key = ".".join(map(str, wrong["loc"])) or "the file"
                raise ConfigError(f"{file}: {key}: {wrong['msg']}; got {wrong['input']!r:.200}") from error
    return None


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Write `training.json` into a checkpoint folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [one if isinstance(one, str) else one._asdict() for one in record.data]
    write_atomically(folder / RECORD_FILE, json.dumps(record.model_dump() | {"data": data}, indent=1) + "\n")


def public_record(record: TrainingRecord) -> TrainingRecord:
    """The record as an exported folder has it: no machine paths in it."""
    base = record.base_model
    return record.model_copy(
        update={
            "base_model": None if base is None else public_model(base),
            "data": tuple(public_text(one) if isinstance(one, str) else one for one in record.data),
            "settings": _public(record.settings),
        }
    )


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(one) for one in value]
    return public_text(value) if isinstance(value, str) else value


def prompt_settings(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """How a Reasoner is asked: `data.embedrl` (see `MediaConfig`), and `max_response_length`, tokens of an answer.

    Args:
        settings: of a record; the defaults of a run stand for what it does not name.
        family: of the model, where they name none.
    """
    length = yaml_of("egrl_trainer")["data"]["max_response_length"]
    known = dataclasses.asdict(MediaConfig()) | {"family": family, "max_response_length": length}
    return {name: settings.get(name, value) for name, value in known.items()}


def public_text(value: object) -> str:
    """`value` as text without machine paths: of each local path the last component is left; hub ids and URLs stay."""
    text = str(value).strip()
    if text.startswith(_STARTS) or _RELATIVE.fullmatch(text):
        return Path(text.removeprefix("file://")).name or text
    text = _PATH.sub(r"\1", text)
    return _WINDOWS_PATH.sub(r"\1", text)


def public_model(name: str) -> str:
    """The name of a model as it may be published: a hub id whole, of a folder on this machine the last component."""
    return Path(name).resolve().name if Path(name).exists() else public_text(name)
