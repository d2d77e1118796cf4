# SPDX-License-Identifier: Apache-2.0
"""What becomes of a finished rollout, by `embedrl.embedder.backend`, and how the reward stage gets the vectors.

| backend | the agent loop | partition `embed` holds | the reward stage |
|---|---|---|---|
| worker | encodes the row | tokens and pixels | embeds all rows (`client.EmbedderClient`) |
| server, sentence_transformers | has the row embedded while other rollouts still run | the vector | reads vectors |

`RowBackend` is the agent loop's side, `QueuedVectors` the reward stage's.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    async def fields(self, prepared: Any) -> TensorDict:
        """The row's fields, a batch of one.

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


class Embeds(Protocol):
    """An Embedder that takes rows one by one, as they come."""

    def prepare(self, inputs: EmbedInput, side: str) -> Any: ...

    async def embed(self, prepared: Any) -> torch.Tensor: ...


class EmbeddedRowsBackend:
    """Backends `server` and `sentence_transformers`: the vector."""

    def __init__(self, embedder: Embeds) -> None:
        self._embedder = embedder

    def prepare(self, inputs: EmbedInput, side: str) -> Any:
        """As the Embedder's own."""
        return self._embedder.prepare(inputs, side)

    async def fields(self, prepared: Any) -> TensorDict:
        """Embed the row, wherever that happens."""
        vector = await self._embedder.embed(prepared)
        return TensorDict({VECTOR: vector[None].float()}, batch_size=[1])


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
