# SPDX-License-Identifier: Apache-2.0
"""The whole tensors of an FSDP checkpoint, from the pieces that its ranks wrote; not a bit is changed.

verl's own merger casts everything to bfloat16 and unpickles with code execution, so it is not used here: files are read
as tensors alone (`weights_only`). A piece is a `DTensor` that knows its mesh of ranks and along which dimension it was
cut; a plain tensor is a buffer that every rank wrote in full.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from embedrl_verl.errors import ConfigError

_SHARD = re.compile(r"model_world_size_(\d+)_rank_\d+\.pt")


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The state of the model that verl's FSDP checkpoint manager saved: name -> whole tensor on the CPU."""
    # That a mesh is read without process groups is meant: nothing is communicated here.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    sizes = {int(match[1]) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    if len(sizes) != 1:
        raise ConfigError(f"{folder} has shards of runs with {sorted(sizes)} ranks; leave those of one run")
    (size,) = sizes
    files = [folder / f"model_world_size_{size}_rank_{rank}.pt" for rank in range(size)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(
            f"{folder}: {size} ranks need {size} files; missing: {', '.join(missing[:5])}. Collect the files of all "
            "nodes in one folder"
        )
    ranks = [_load(file) for file in files]
    for rank, state in enumerate(ranks):
        if different := sorted(ranks[0].keys() ^ state.keys()):
            raise ConfigError(
                f"{folder}: all ranks must hold the same weights; ranks 0 and {rank} differ in "
                f"{', '.join(different[:5])}. The files are of different runs; copy the checkpoint again"
            )
    return {name: _join(f"{folder}: {name}", [state.pop(name) for state in ranks]) for name in sorted(ranks[0])}


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read as saved tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"{file} must hold a dictionary of tensors and nothing else")
    return state


def _join(where: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    """One tensor from the pieces of all ranks, in the order of ranks."""
    cut = [piece for piece in pieces if isinstance(piece, DTensor)]
    if not cut:
        return _same(where, pieces)
    layouts = {f"{piece.device_mesh.mesh.tolist()} {piece.placements}" for piece in cut}
    mesh = cut[0].device_mesh.mesh
    if len(cut) < len(pieces) or len(layouts) > 1 or sorted(mesh.flatten().tolist()) != list(range(len(pieces))):
        raise ConfigError(
            f"{where}: the {len(pieces)} files must agree how it was cut; {len(pieces) - len(cut)} hold it whole, the "
            f"others cut as {sorted(layouts)}. They are of different runs; copy the checkpoint again"
        )
    whole = _gather(where, mesh, cut[0].placements, [piece.to_local() for piece in cut])
    if whole.shape != cut[0].shape:
        raise ConfigError(f"{where}: the pieces give {tuple(whole.shape)}, not {tuple(cut[0].shape)}; copy them again")
    return whole


def _gather(where: str, mesh: torch.Tensor, placements: tuple[Any, ...], local: list[torch.Tensor]) -> torch.Tensor:
    """Undo the placements of a (part of the) mesh, outermost dimension last."""
    if mesh.dim() == 0:
        return local[int(mesh)]
    parts = [_gather(where, part, placements[1:], local) for part in mesh]
    if isinstance(placements[0], Replicate):
        return _same(where, parts)
    if type(placements[0]) is not Shard:  # strided shards (tensor parallel) have another order of parts
        raise ConfigError(f"{where}: only plain shards and replicas can be merged; got {placements[0]}")
    return torch.cat(parts, dim=placements[0].dim)


def _same(where: str, copies: list[torch.Tensor]) -> torch.Tensor:
    for rank, copy in enumerate(copies):
        if copy.dtype != copies[0].dtype or not torch.equal(copy, copies[0]):
            raise ConfigError(f"{where}: copies must be equal; copy 0 and copy {rank} differ. Copy the files again")
    return copies[0]
