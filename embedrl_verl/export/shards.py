# SPDX-License-Identifier: Apache-2.0
"""The whole tensors of an FSDP checkpoint, from the pieces that its ranks wrote; not a bit is changed.

verl's own merger casts everything to bfloat16, so it is not used here. A piece is a `DTensor` that knows its mesh of
ranks and along which dimension it was cut; a plain tensor is a buffer that every rank wrote in full. Files are read
without running code from them (`weights_only`).
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from embedrl_verl.errors import ConfigError

_MESH_LOG = logging.getLogger("torch.distributed.device_mesh")
_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The state of the model that verl's FSDP checkpoint manager saved: name -> whole tensor on the CPU.

    Raises:
        ConfigError: fsdp_config.json or a rank's file is missing or unreadable, ranks hold different names or
            different copies of the same tensor, or a tensor was cut in a way that is not supported.
    """
    ranks = [_load(folder / name) for name in _shard_names(folder)]
    names = set(ranks[0])
    for rank, state in enumerate(ranks[1:], start=1):
        different = sorted(names ^ set(state))
        if different:
            raise ConfigError(
                f"{folder}: all ranks must hold the same weights; ranks 0 and {rank} differ in {_first(different)}. "
                "The files are of different runs; copy the checkpoint again"
            )
    return {name: _join(f"{folder}: {name}", [state.pop(name) for state in ranks]) for name in sorted(names)}


def _shard_names(folder: Path) -> list[str]:
    """File names of all ranks in order, after proof that they are there."""
    file = folder / "fsdp_config.json"
    try:
        size = json.loads(file.read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} must hold the number of ranks as world_size ({type(error).__name__}: {error}); "
            "copy the checkpoint again"
        ) from error
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"{file}: world_size must be a positive number; got {size!r}")
    names = [f"model_world_size_{size}_rank_{rank}.pt" for rank in range(size)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
        raise ConfigError(
            f"{folder}: {size} ranks need {size} files; missing: {_first(missing)}; found: {_first(found) or 'none'}. "
            "Collect the files of all nodes in one folder"
        )
    return names


def _load(file: Path) -> dict[str, Any]:
    _MESH_LOG.addFilter(_not_here)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read as saved tensors: {error}") from error
    finally:
        _MESH_LOG.removeFilter(_not_here)
    if not isinstance(state, dict) or not state:
        raise ConfigError(f"{file} must hold a dictionary of tensors; got {type(state).__name__}, or nothing in it")
    strange = sorted(name for name, value in state.items() if not isinstance(value, torch.Tensor))
    if strange:
        raise ConfigError(f"{file}: every entry must be a tensor; {_first(strange)} is not")
    return state


def _not_here(record: logging.LogRecord) -> bool:
    """Drops torch's warning that a mesh was read without process groups: nothing is communicated here."""
    return "pickling/unpickling" not in record.getMessage()


def _join(where: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    """One tensor from the pieces of all ranks, in the order of ranks."""
    first = pieces[0]
    if not isinstance(first, DTensor):
        return _same(where, pieces)
    layouts = {(piece.device_mesh.mesh.tolist().__repr__(), piece.placements) for piece in _dtensors(where, pieces)}
    if len(layouts) > 1:
        raise ConfigError(f"{where}: all ranks must agree how a tensor was cut; got {sorted(map(str, layouts))}")
    mesh = first.device_mesh.mesh
    if sorted(mesh.flatten().tolist()) != list(range(len(pieces))):
        raise ConfigError(f"{where}: cut over the ranks {mesh.tolist()}, but there are {len(pieces)} files")
    whole = _gather(where, mesh, first.placements, [piece.to_local() for piece in _dtensors(where, pieces)])
    if whole.shape != first.shape:
        raise ConfigError(f"{where}: the pieces give {tuple(whole.shape)}, not {tuple(first.shape)}; copy them again")
    return whole


def _dtensors(where: str, pieces: list[torch.Tensor]) -> list[DTensor]:
    plain = [rank for rank, piece in enumerate(pieces) if not isinstance(piece, DTensor)]
    if plain:
        raise ConfigError(f"{where}: cut on rank 0, but whole on ranks {plain}; the files are of different runs")
    return [piece for piece in pieces if isinstance(piece, DTensor)]


def _gather(where: str, mesh: torch.Tensor, placements: tuple[Any, ...], local: list[torch.Tensor]) -> torch.Tensor:
    """Undo the placements of a (part of the) mesh, outermost dimension last."""
    if mesh.dim() == 0:
        return local[int(mesh)]
    parts = [_gather(where, part, placements[1:], local) for part in mesh]
    placement = placements[0]
    if isinstance(placement, Replicate):
        return _same(where, parts)
    if type(placement) is not Shard:  # strided shards (tensor parallel) have another order of parts
        raise ConfigError(f"{where}: only plain shards and replicas can be merged; got {placement}")
    return torch.cat(parts, dim=placement.dim)


def _same(where: str, copies: list[torch.Tensor]) -> torch.Tensor:
    for rank, copy in enumerate(copies):
        if copy.dtype != copies[0].dtype or copy.shape != copies[0].shape or not torch.equal(copy, copies[0]):
            raise ConfigError(f"{where}: copies must be equal; copy 0 and copy {rank} differ. Copy the files again")
    return copies[0]


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
