# SPDX-License-Identifier: Apache-2.0
"""verl's checkpoint engine `gloo`: new weights from the actor to rollout servers in processes of their own, on CPUs.

verl's other engines need a GPU's or NPU's transport, or servers that share the actor's processes. This one makes a gloo
group of actor rank 0 and all rollout workers for each update, and broadcasts buckets of tensors in it; TCP, so the
workers may be on other machines. Chosen by `actor_rollout_ref.rollout.checkpoint_engine.backend=gloo` and
`.custom_backend_module=embedrl_verl.platforms.cpu_checkpoint_engine` (platform=cpu sets both); used by the trainer mode
`egrl_separate_async`, and idle in all others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
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

ALIGNMENT = 16  # bytes; tensors are viewed in place, which asks for a multiple of their element size


@dataclass(frozen=True)
class Meeting:
    """Where the processes of an update find each other: address of the store that actor rank 0 serves."""

    host: str
    port: int


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

    def prepare(self) -> Meeting | None:
        """Actor rank 0 opens a store and tells where; the others have nothing to say."""
        if not self._is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        return Meeting(host, self._store.port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Meeting | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Ranks of the update: 0 for actor rank 0, none (-1) for its other ranks, 1... for the rollout workers."""
        actor, rollout = actor_wg_world_size, rollout_world_size
        return (
            {
                "rank": [0] + [-1] * (actor - 1),
                "world_size": [1 + rollout] * actor,
                "meeting": [metadata[0]] * actor,
            },
            {
                "rank": list(range(1, 1 + rollout)),
                "world_size": [1 + rollout] * rollout,
                "meeting": [metadata[0]] * rollout,
            },
        )

    def init_process_group(self, rank: int, world_size: int, meeting: Meeting) -> None:
        """Join the group of this update."""
        if rank < 0:
            return
        if self._store is None:
            self._store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=self._timeout)
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
        bucket = torch.empty(self._bucket_size, dtype=torch.uint8)
        used = 0
        metas: list[TensorMeta] = []
        async for meta, chunk in split_weight_chunks(weights, self._bucket_size):
            start = -(-used // ALIGNMENT) * ALIGNMENT
            if start + meta.chunk_size > self._bucket_size:
                await self._send_bucket(bucket[:used], metas, last=False)
                start, metas = 0, []
            used = start + meta.chunk_size
            bucket[start:used] = chunk
            meta.offset = start
            metas.append(meta)
        await self._send_bucket(bucket[:used], metas, last=True)

    async def _send_bucket(self, bucket: torch.Tensor, metas: list[TensorMeta], *, last: bool) -> None:
        header = torch.frombuffer(bytearray(_encode(metas)), dtype=torch.uint8)
        await self._broadcast(torch.tensor([header.numel(), bucket.numel(), int(last)]))
        await self._broadcast(header)
        await self._broadcast(bucket)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """The tensors as they were sent: (name, CPU tensor of its own shape and dtype)."""
        async for name, tensor in merge_weight_chunks(self._chunks(), self._bucket_size):
            yield name, tensor

    async def _chunks(self) -> AsyncIterator[tuple[TensorMeta, torch.Tensor]]:
        last = 0
        while not last:
            sizes = await self._broadcast(torch.zeros(3, dtype=torch.int64))
            header_bytes, bucket_bytes, last = sizes.tolist()
            header = await self._broadcast(torch.empty(header_bytes, dtype=torch.uint8))
            # A new bucket each time: the tensors that are handed on are views of it.
            bucket = await self._broadcast(torch.empty(bucket_bytes, dtype=torch.uint8))
            for meta in _decode(header.numpy().tobytes()):
                yield meta, bucket[meta.offset : meta.offset + meta.chunk_size]

    async def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` of rank 0, in place, on every rank; an empty one does not travel."""
        assert self._group is not None, "init_process_group comes before sending and receiving"
        if tensor.numel():
            work = self._group.broadcast(tensor, 0)  # type: ignore[attr-defined]  # torch's stub leaves it out
            await asyncio.to_thread(work.wait)
        return tensor


def _encode(metas: list[TensorMeta]) -> bytes:
    """JSON: nothing that a peer sends is ever unpickled."""
    rows = [
        [m.name, list(m.shape), str(m.dtype).removeprefix("torch."), m.chunk_offset, m.chunk_size, m.offset]
        for m in metas
    ]
    return json.dumps(rows).encode()


def _decode(header: bytes) -> list[TensorMeta]:
    return [
        TensorMeta(
            name=name,
            shape=torch.Size(shape),
            dtype=getattr(torch, dtype),
            chunk_offset=chunk_offset,
            chunk_size=chunk_size,
            offset=offset,
        )
        for name, shape, dtype, chunk_offset, chunk_size, offset in json.loads(header)
    ]
