# SPDX-License-Identifier: Apache-2.0
"""`training.json`: what a training stage writes about itself beside its checkpoint, and the model card repeats.

    {"stage": "contrastive", "step": 400, "base_model": "Qwen/Qwen2-VL-2B-Instruct",
     "data": ["train.parquet", {"source": "birds", "pairs": 1200}],
     "settings": {"learning_rate": 1e-5}, "scores": {"hit@1": 0.81}}

Every key may be absent; absent means unknown. `public_text` keeps machine paths out of what is published.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedrl_verl.errors import ConfigError

RECORD_FILE = "training.json"
EMBEDDER_STAGES = frozenset({"contrastive", "embedder"})
REASONER_STAGES = frozenset({"sft", "rl", "egrl", "eg_rl", "grpo", "reasoner"})
_STARTS = ("/", "~", "./", "../", "file://")
_WORD = r"[^\s/,;:='\"|()\[\]]+"
# One slash is a hub id unless it names a file; two and more are a path.
_RELATIVE = re.compile(rf"{_WORD}/(?:{_WORD}\.(?:parquet|jsonl?|csv|pt|safetensors|ya?ml)|{_WORD}/\S*)")
_PATH = re.compile(rf"(?<![\w:/.])(?:file://)?(?:~|\.{{1,2}})?/(?:{_WORD}/)*({_WORD})/?")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\\\s]+\\)*([^\\\s]+)\\?")


@dataclass(frozen=True)
class TrainingRecord:
    """The content of a `training.json`; empty or None where it says nothing."""

    stage: str | None = None
    step: int | None = None
    base_model: str | None = None
    data: tuple[tuple[str, int | None], ...] = ()
    """(source, number of pairs or None)."""
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def read_record(folder: Path) -> TrainingRecord | None:
    """The record in a checkpoint folder or in its parent; None if neither has one.

    Raises:
        ConfigError: the file is not JSON, or a key has another type than the module's docstring says.
    """
    for file in (folder / RECORD_FILE, folder.resolve().parent / RECORD_FILE):
        if file.is_file():
            break
    else:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} must be a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must be a JSON object; got {type(content).__name__}")
    return TrainingRecord(
        stage=_typed(file, content, "stage", str),
        step=_typed(file, content, "step", int),
        base_model=_typed(file, content, "base_model", str),
        data=tuple(_source(file, entry) for entry in _typed(file, content, "data", list) or ()),
        settings=_typed(file, content, "settings", dict) or {},
        scores=_scores(file, _typed(file, content, "scores", dict) or {}),
    )


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


def _typed(file: Path, content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ConfigError(f"{file}: {key} must be of type {kind.__name__}; got {value!r}")
    return value


def _source(file: Path, entry: object) -> tuple[str, int | None]:
    if isinstance(entry, str):
        return entry, None
    if isinstance(entry, dict) and isinstance(entry.get("source"), str):
        return entry["source"], _typed(file, entry, "pairs", int)
    raise ConfigError(f'{file}: an entry of data must be a string or {{"source": str, "pairs": int}}; got {entry!r}')


def _scores(file: Path, scores: dict[str, Any]) -> dict[str, float]:
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{file}: the score {name} must be a number; got {value!r}")
    return {name: float(value) for name, value in scores.items()}
