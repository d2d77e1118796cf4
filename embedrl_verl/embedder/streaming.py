# SPDX-License-Identifier: Apache-2.0
"""What becomes of a finished rollout, by `embedrl.embedder.backend`, and how the reward stage gets the vectors.

| backend | the agent loop | partition `embed` holds | the reward stage |
|---|---|---|---|
| worker | encodes the row | tokens and pixels | embeds all rows (`client.EmbedderClient`) |
| server, sentence_transformers | has the row embedded while other rollouts still run | the vector | reads vectors |

`RowBackend` is the agent loop's side, `QueuedVectors` the reward stage's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transfer_queue as tq
from tensordict import TensorDict

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor, Encoded
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.errors import EmbedderError

VECTOR = "embeddings"
NO_DIRECTION = "the Embedder gave a vector that is not finite or has no direction"


class RowBackend(Protocol):
    """Turns a finished row into what partition `embed` holds of it."""

    def prepare(self, inputs: EmbedInput, side: str) -> Any:
        """The blocking part, called in a thread; `side` is "query" or "target".

        Raises:
            MediaError, EmbedderError: the row cannot be embedded.
        """

    async def store(self, key: str, partition_id: str, prepared: Any) -> None:
        """Put what the reward stage needs of the row into TransferQueue; returns when it is there.

        Raises:
            EmbedderError: it has no vector; the message is the cause alone, to count rows by.
        """


class EncodedRows:
    """Backend `worker`: pixels and tokens."""

    def __init__(self, processor: EmbedProcessor) -> None:
        self._processor = processor

    def prepare(self, inputs: EmbedInput, side: str) -> Encoded:
        """Encode; both sides alike."""
        return self._processor.encode(inputs)

    async def fields(self, prepared: Encoded) -> TensorDict:
        """As TransferQueue stores a row."""
        return prepared.to_tensordict()

    async def store(self, key: str, partition_id: str, prepared: Encoded) -> None:
        """A put for each row: what rows hold differs in length."""
        fields = await self.fields(prepared)
        await tq.async_kv_batch_put(keys=[key], partition_id=partition_id, fields=fields, tags=[{}])


@dataclass(frozen=True)
class _Put:
    key: str
    partition_id: str
    fields: TensorDict
    written: asyncio.Future[None]

    @property
    def kind(self) -> tuple[str, torch.Size]:
        """Puts of the same kind can be one."""
        return self.partition_id, self.fields[VECTOR].shape


class VectorWriter:
    """Puts vectors into TransferQueue; those that come while a put is under way go together in the next one.

    A put takes four round trips whatever it holds. With one for each row, hundreds of rows queue up, and the last
    rollouts wait for seconds.
    """

    def __init__(self) -> None:
        self._waiting: list[_Put] = []
        self._writer: asyncio.Task[None] | None = None

    async def put(self, key: str, partition_id: str, fields: TensorDict) -> None:
        """Returns when the vector is in the queue. `fields` is a batch of one."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Put(key, partition_id, fields, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        while self._waiting:
            kind = self._waiting[0].kind
            batch = [one for one in self._waiting if one.kind == kind]
            self._waiting = [one for one in self._waiting if one.kind != kind]
            failure: Exception | None = None
            try:
                await tq.async_kv_batch_put(
                    keys=[one.key for one in batch],
                    partition_id=batch[0].partition_id,
                    fields=TensorDict(
                        {VECTOR: torch.cat([one.fields[VECTOR] for one in batch])}, batch_size=[len(batch)]
                    ),
                    tags=[{} for _ in batch],
                )
            except Exception as error:  # goes to those who wait; the next batch is tried
                failure = error
            for written in (one.written for one in batch if not one.written.done()):  # done: its rollout was cancelled
                if failure is None:
                    written.set_result(None)
                else:
                    written.set_exception(failure)


class Embeds(Protocol):
    """An Embedder that takes rows one by one, as they come."""

    def prepare(self, inputs: EmbedInput, side: str) -> Any: ...

    async def embed(self, prepared: Any) -> torch.Tensor: ...


class EmbeddedRowsBackend:
    """Backends `server` and `sentence_transformers`: the vector."""

    def __init__(self, embedder: Embeds) -> None:
        self._embedder = embedder
        self._writer = VectorWriter()

    def prepare(self, inputs: EmbedInput, side: str) -> Any:
        """As the Embedder's own."""
        return self._embedder.prepare(inputs, side)

    async def fields(self, prepared: Any) -> TensorDict:
        """Embed the row, wherever that happens."""
        vector = await self._embedder.embed(prepared)
        return TensorDict({VECTOR: vector[None].float()}, batch_size=[1])

    async def store(self, key: str, partition_id: str, prepared: Any) -> None:
        """Together with other rows that have their vectors by then."""
        await self._writer.put(key, partition_id, await self.fields(prepared))


def row_backend(config: EmbedderConfig, *, max_frames: int, processes: int) -> RowBackend:
    """The backend of the section `embedrl.embedder` for one of `processes` agent-loop workers.

    Raises:
        EmbedderError, ConfigError: checkpoint and settings do not fit.
    """
    if config.backend == "worker":
        return EncodedRows(processor_for(config, max_frames=max_frames))
    if config.backend == "server":
        from embedrl_verl.embedder.served.client import ServedEmbedder

        return EmbeddedRowsBackend(
            ServedEmbedder(config, processor_for(config, max_frames=max_frames), share=processes)
        )
    from embedrl_verl.embedder.sentence_actor import SentenceClient

    return EmbeddedRowsBackend(SentenceClient(config, max_frames=max_frames))


class QueuedVectors:
    """Reads the vectors that agent loops have put into TransferQueue; stands where the worker's client would."""

    def embed_rows(
        self, keys: Sequence[str], partition_id: str, *, averaged: bool = False
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """float32 (N, D) at length 1 in the order of `keys`, NaN where a row failed, and why it did, by position.

        Raises:
            EmbedderError: no keys, keys that the partition does not have, vectors of different widths, or `averaged`
                (these Embedders are frozen).
        """
        if not keys or averaged:
            raise EmbedderError(
                "rows of a frozen Embedder are read by their keys; got none, or an average was asked for"
            )
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=[VECTOR])
        if len(data) != len(keys) or VECTOR not in set(data.keys()):
            raise EmbedderError(
                f"asked for {len(keys)} vectors of partition {partition_id!r}, got {len(data)} rows with "
                f"{sorted(data.keys())}"
            )
        rows = list(data[VECTOR].unbind())
        widths = sorted({len(row) for row in rows})
        if len(widths) > 1:
            raise EmbedderError(
                f"the vectors of a batch have different widths, {widths}: the servers hold different models"
            )
        vectors = torch.stack(rows).float()
        lengths = vectors.norm(dim=1)
        failed = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        vectors = vectors / lengths[:, None]
        vectors[failed] = float("nan")
        return vectors, dict.fromkeys(failed, NO_DIRECTION)
