# SPDX-License-Identifier: Apache-2.0
"""verl's checkpoint engine `gloo`: new weights from the actor to rollout servers in processes of their own, on CPUs.

verl's other engines need a GPU's or NPU's transport, or servers that share the actor's processes. This one makes a gloo
group of actor rank 0 and all rollout workers for each update, and broadcasts the tensors in it; TCP, so the workers may
be on other machines. Chosen by `actor_rollout_ref.rollout.checkpoint_engine.backend=gloo` and
`.custom_backend_module=embedrl_verl.platforms.cpu_checkpoint_engine` (platform=cpu sets both); used by the trainer mode
`egrl_separate_async`, and idle in all others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import (
    CheckpointEngine,
    CheckpointEngineRegistry,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)

HEADER_BYTES = 4096
Address = tuple[str, int]
"""Of the store that actor rank 0 serves, where the processes of an update find each other."""


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcasts weights over gloo; verl calls prepare, init_process_group, send/receive and finalize for each update.

    Args:
        bucket_size: bytes that travel at once; a larger tensor takes several.
        is_master: whether this is actor rank 0, the one that sends.
        timeout_s: after which a process that waits for another one gives up with an error.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = 600.0) -> None:
        self._bucket_size = bucket_size
        self._is_master = is_master
        self._timeout = timedelta(seconds=timeout_s)
        self._store: TCPStore | None = None
        self._group: ProcessGroupGloo | None = None

    def prepare(self) -> Address | None:
        """Actor rank 0 opens a store and tells where."""
        if not self._is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        return host, self._store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Address | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Ranks of the update: 0 for actor rank 0, none (-1) for its other ranks, 1... for the rollout workers."""

        def of(ranks: list[int]) -> dict[str, list[Any]]:
            size = 1 + rollout_world_size
            return {"rank": ranks, "world_size": [size] * len(ranks), "address": metadata[:1] * len(ranks)}

        return of([0] + [-1] * (actor_wg_world_size - 1)), of(list(range(1, 1 + rollout_world_size)))

    def init_process_group(self, rank: int, world_size: int, address: Address) -> None:
        """Join the group of this update."""
        if rank < 0:
            return
        if self._store is None:
            self._store = TCPStore(*address, is_master=False, timeout=self._timeout)
        self._group = ProcessGroupGloo(PrefixStore("weights", self._store), rank, world_size, self._timeout)

    def finalize(self) -> None:
        """Leave the group."""
        self._group = None
        self._store = None

    async def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        """Send every tensor of `weights`, in order. Ranks outside the group only take part in gathering them."""
        if self._group is None:
            for _ in weights:
                pass
            return
        async for meta, chunk in split_weight_chunks(weights, self._bucket_size):
            await self._broadcast(_header(meta))
            await self._broadcast(chunk)
        await self._broadcast(torch.zeros(HEADER_BYTES, dtype=torch.uint8))

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """The tensors as they were sent: (name, CPU tensor of its own shape and dtype)."""
        async for name, tensor in merge_weight_chunks(self._chunks(), self._bucket_size):
            yield name, tensor

    async def _chunks(self) -> AsyncIterator[tuple[TensorMeta, torch.Tensor]]:
        while (header := await self._broadcast(torch.empty(HEADER_BYTES, dtype=torch.uint8))).any():
            meta = _meta(header)
            yield meta, await self._broadcast(torch.empty(meta.chunk_size, dtype=torch.uint8))

    async def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` of rank 0, in place, on every rank."""
        assert self._group is not None, "init_process_group comes before sending and receiving"
        work = self._group.broadcast(tensor, 0)  # type: ignore[attr-defined]  # torch's stub leaves it out
        await asyncio.to_thread(work.wait)
        return tensor


def _header(meta: TensorMeta) -> torch.Tensor:
    """JSON, padded with zeros: nothing that a peer sends is ever unpickled."""
    dtype = str(meta.dtype).removeprefix("torch.")
    text = json.dumps([meta.name, list(meta.shape), dtype, meta.chunk_offset, meta.chunk_size]).encode()
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def _meta(header: torch.Tensor) -> TensorMeta:
    name, shape, dtype, chunk_offset, chunk_size = json.loads(header.numpy().tobytes().rstrip(b"\0"))
    return TensorMeta(name, torch.Size(shape), getattr(torch, dtype), chunk_offset, chunk_size, offset=None)
