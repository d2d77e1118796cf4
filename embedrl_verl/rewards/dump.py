# SPDX-License-Identifier: Apache-2.0
"""A step's rewards in one file, complete enough to compute them again, or others, without any model.

`<step>.rewards.safetensors` (one more number, `<step>.<part>.rewards.safetensors`, where a step is rewarded in parts)
lies beside verl's `<step>.jsonl` in `trainer.rollout_data_dir`. It holds the similarities in float32 as they were, the
reward function's results, and the texts. Tensors and JSON only: nothing in it can run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import DataError, EmbedRLError
from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.tcot import TCoT, parse_tcot

FORMAT = "embedrl-reward-dump"
VERSION = "2"
READABLE = ("1", VERSION)  # in version 1 `content` is (N,), the target's alone
PAIRS = "pairs.json"
"""In the folder of the dumps: which pairs the rollouts are of (`note_pairs`)."""
_SUFFIX = ".rewards.safetensors"
_STEP = re.compile(r"(\d+)(?:\.(\d+))?" + re.escape(_SUFFIX))
_ALWAYS = ("side", "pair", "rollout", "valid", "content", "similarity", "query_rows", "target_rows")
_MAYBE = ("lengths", "raw_similarity")
_PART = "part:"


def dump_name(step: int, part: int | None = None) -> str:
    """File name of a step's dump, or of one of its parts."""
    return f"{step}{_SUFFIX}" if part is None else f"{step}.{part}{_SUFFIX}"


@dataclass(frozen=True)
class RewardDump:
    """What a dump holds.

    batch: the step's batch, bit for bit. It has a judge if the run's reward had the part "process": one that gives the
        same answers again.
    parts: the reward function's results, (N,) float32 each, with "score".
    rows: N mappings with `pair_id`, `data_source`, `text` (the T-CoT), `num_images`, `num_frames`.
    function: what the run called its reward function, "" if it did not state it.
    kwargs: the function's `reward_kwargs` in the run, None if it did not state them (older dumps).
    """

    batch: RewardBatch
    parts: dict[str, Tensor]
    rows: list[dict[str, Any]]
    function: str
    kwargs: dict[str, Any] | None = None


def write_reward_dump(
    path: Path,
    batch: RewardBatch,
    parts: Mapping[str, Tensor],
    *,
    rows: Sequence[Mapping[str, Any]],
    function: str = "",
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a dump; the file is there whole or not at all. Arguments as in `RewardDump`.

    Args:
        path: file to write, named by `dump_name`; its folder is made if missing.
        rows: parsing `text` for `num_images` and `num_frames` (0 or None: the input has none) gives the batch's T-CoT.
    """
    _check(batch, parts, rows)
    tensors = {name: value for name in (*_ALWAYS, *_MAYBE) if (value := getattr(batch, name)) is not None}
    tensors |= {_PART + name: value for name, value in parts.items()}
    stated = {"rows": [dict(row) for row in rows], "required": list(batch.required), "function": function}
    stated |= {} if kwargs is None else {"reward_kwargs": dict(kwargs)}
    tensors["json"] = torch.frombuffer(bytearray(json.dumps(stated).encode()), dtype=torch.uint8)
    # Clones: the format refuses tensors that share memory, and a function may return one tensor under two names.
    content = save(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        metadata={"format": FORMAT, "version": VERSION},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise EmbedRLError(f"{path}: the reward dump cannot be written ({error})") from error


def read_reward_dump(path: Path) -> RewardDump:
    """Read a dump; DataError names a file that is missing, damaged, of another kind or of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable reward dump ({error})") from error
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path}: not a reward dump; its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("version") not in READABLE:
        raise DataError(
            f"{path}: a reward dump of version {metadata.get('version')}; this embedrl reads versions "
            f"{' and '.join(READABLE)}. Use the embedrl that wrote it"
        )
    try:
        return _dump_of(tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a damaged reward dump ({type(error).__name__}: {error})") from error


def _dump_of(tensors: dict[str, Tensor]) -> RewardDump:
    stated = json.loads(tensors["json"].numpy().tobytes())
    kwargs = stated.get("reward_kwargs")
    if not (kwargs is None or isinstance(kwargs, dict)):
        raise ValueError(f"reward_kwargs must be a mapping; got {kwargs!r}")
    parts = {name.removeprefix(_PART): value for name, value in tensors.items() if name.startswith(_PART)}
    content = tensors["content"]
    known = {name: tensors[name] for name in (*_ALWAYS, *_MAYBE) if name in tensors or name in _ALWAYS}

    async def same_answers(_: RewardBatch) -> Tensor:
        return parts["process"]

    batch = RewardBatch(
        **{**known, "content": content[:, None] if content.dim() == 1 else content},
        tcots=tuple(_parsed(row) for row in stated["rows"]),
        required=tuple(stated["required"]),
        judge=same_answers if "process" in parts else None,
    )
    _check(batch, parts, stated["rows"])
    if not torch.cat((batch.query_rows, batch.target_rows)).sort().values.equal(torch.arange(len(batch))):
        raise ValueError("query_rows and target_rows must have every row once")
    return RewardDump(batch, parts, stated["rows"], stated["function"], kwargs)


def _check(batch: RewardBatch, parts: Mapping[str, Tensor], rows: Sequence[Any]) -> None:
    if len(rows) != len(batch):
        raise ValueError(f"rows must have one entry for each of {len(batch)} rows; got {len(rows)}")
    for name, value in parts.items():
        if value.shape != (len(batch),) or value.dtype != torch.float32:
            raise ValueError(f"part {name!r} must be ({len(batch)},) float32; got {tuple(value.shape)} {value.dtype}")
    if "score" not in parts:
        raise ValueError(f"parts must have 'score'; got {', '.join(parts)}")


def _parsed(row: Mapping[str, Any]) -> TCoT:
    if missing := [key for key in ("pair_id", "data_source", "text", "num_images", "num_frames") if key not in row]:
        raise ValueError(f"a row must have pair_id, data_source, text, num_images, num_frames; {missing} is missing")
    return parse_tcot(row["text"], num_frames=row["num_frames"] or None, num_images=row["num_images"] or None)


def note_pairs(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `pairs.json`: "train_files", "val_files" (lists), "media_root" (or null) and "embedrl" (`data.embedrl`, its
    family resolved), for who reads the dumps later."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAIRS, json.dumps(dict(data), indent=1) + "\n")


def find_dumps(run: str | Path) -> list[tuple[str, Path]]:
    """The dumps of a run, by step: ("12", file), or ("12.0", file) for a part of a step.

    Args:
        run: one dump file, the folder with them, or the folder of the run (`rollouts` in it, or one folder below).
    """
    run = Path(run)
    if run.is_file():
        return [(run.name.removesuffix(_SUFFIX), run)]
    folders = [run, run / "rollouts", *sorted(run.glob("*/rollouts"))]
    found = {folder: dumps for folder in folders if folder.is_dir() and (dumps := _dumps_in(folder))}
    if len(found) != 1:
        several = f"dumps of several runs ({', '.join(map(str, found))}); name one of them"
        none = "no reward dump (*.rewards.safetensors); runs with trainer.rollout_data_dir write one a step"
        raise DataError(f"{run} has {several if found else none}" if run.is_dir() else f"there is no {run}")
    return next(iter(found.values()))


def _dumps_in(folder: Path) -> list[tuple[str, Path]]:
    numbered = [(found, path) for path in folder.iterdir() if (found := _STEP.fullmatch(path.name))]
    numbered.sort(key=lambda entry: (int(entry[0][1]), int(entry[0][2] or 0)))
    return [(path.name.removesuffix(_SUFFIX), path) for _, path in numbered]
