# SPDX-License-Identifier: Apache-2.0
"""Embedders by every backend that a run's reward has, in one form: in this process, on vLLM servers, by
sentence-transformers. An input that fails alone is an error in its place, and the others have their vectors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.schema import Side
from embedrl_verl.embedder import Embedder, EmbedInput, Encoded
from embedrl_verl.embedder.batching import NOT_FINITE, failed_rows
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served.client import ServedEmbedder
from embedrl_verl.errors import EmbedRLError, ModelFailedError
from embedrl_verl.model.remote import Loop
from embedrl_verl.model.tcots import FAILURES

if TYPE_CHECKING:
    from embedrl_verl.embedder.sentence import SentenceRow


class Embedded(NamedTuple):
    """float32 (D,) of length 1, and how many tokens the model has read for it; None where its backend does not say."""

    vector: torch.Tensor
    tokens: int | None = None


Vector = Embedded | EmbedRLError
"""An input's vector, or why there is none."""


class Embeds(Protocol):
    """An Embedder, wherever it runs."""

    def vectors(self, inputs: Sequence[EmbedInput], side: Side) -> list[Vector]:
        """The vector of each input, in order. `side`: sentence-transformers models have prompts of their own."""


class LocalEmbedder:
    """An `Embedder` in this process."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._lock = threading.Lock()  # a batch is encoded while another one is embedded, in another thread

    def vectors(self, inputs: Sequence[EmbedInput], side: Side) -> list[Vector]:
        """See `Embeds`."""
        found: dict[int, Vector] = {}
        rows: dict[int, Encoded] = {}
        for number, one in enumerate(inputs):
            try:
                rows[number] = self.embedder.processor.encode(one)
            except FAILURES as error:
                found[number] = error
        with self._lock:
            vectors = self.embedder.embed_encoded(list(rows.values()))
        for (number, row), vector in zip(rows.items(), vectors, strict=True):
            found[number] = Embedded(vector, len(row))
        for index in failed_rows(vectors):
            found[list(rows)[index]] = ModelFailedError(NOT_FINITE)
        return [found[number] for number in range(len(inputs))]


class ServerEmbedder:
    """Stock vLLM pooling servers (`embedrl serve-embedder`)."""

    def __init__(self, config: EmbedderConfig, processor: EmbedProcessor) -> None:
        self._client = ServedEmbedder(config, processor)
        self._loop = Loop()

    def vectors(self, inputs: Sequence[EmbedInput], side: Side) -> list[Vector]:
        """See `Embeds`."""

        async def one(given: EmbedInput) -> Vector:
            try:
                request = await asyncio.to_thread(self._client.prepare, given)
                return Embedded(await self._client.embed(request), len(request.input_ids))
            except FAILURES as error:
                return error

        async def every() -> list[Vector]:
            return list(await asyncio.gather(*map(one, inputs)))

        return self._loop.run(every())


class SentenceEmbedder:
    """Any sentence-transformers model in this process."""

    def __init__(self, config: EmbedderConfig, max_frames: int, device: str) -> None:
        from embedrl_verl.embedder.sentence import SentenceClient, SentenceModel  # they import ray

        self._client, self._model = SentenceClient(config, max_frames=max_frames), SentenceModel(config, device)

    def vectors(self, inputs: Sequence[EmbedInput], side: Side) -> list[Vector]:
        """See `Embeds`."""
        found: dict[int, Vector] = {}
        rows: dict[int, SentenceRow] = {}
        for number, one in enumerate(inputs):
            try:
                rows[number] = self._client.prepare(one, side)
            except FAILURES as error:
                found[number] = error
        for number, vector in zip(rows, self._model.embed(list(rows.values())), strict=True):
            found[number] = vector if isinstance(vector, EmbedRLError) else Embedded(vector)
        return [found[number] for number in range(len(inputs))]
