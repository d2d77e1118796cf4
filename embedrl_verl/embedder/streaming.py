# SPDX-License-Identifier: Apache-2.0
"""What becomes of a finished rollout, by `embedrl.embedder.backend`, and how the reward stage gets the vectors.

| backend | the agent loop | partition `embed` holds | the reward stage |
|---|---|---|---|
| worker | encodes the row | tokens and pixels | embeds all rows (`client.EmbedderClient`) |
| server, sentence_transformers | has the row embedded while other rollouts still run | the vector | reads vectors |

`RowBackend` is the agent loop's side. The trainer's is `start_streamed_embedder`, before the actor's start, which it
then shares the time with; later `ready` gives the `QueuedVectors`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

from embedrl_verl.config.schema import EmbedderConfig, MediaConfig
from embedrl_verl.embedder.batching import Embedded, unit
from embedrl_verl.embedder.gather import Gatherer
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor, processor_for
from embedrl_verl.errors import EmbedderError

if TYPE_CHECKING:
    from embedrl_verl.embedder.sentence import SentenceClient
    from embedrl_verl.embedder.served.client import ServedEmbedder

logger = logging.getLogger(__name__)
VECTOR = "embeddings"


class RowBackend:
    """Turns a finished row into what partition `embed` holds of it. This one is backend `worker`: tokens and pixels."""

    def __init__(self, processor: EmbedProcessor) -> None:
        self._processor = processor

    def prepare(self, inputs: EmbedInput, side: str) -> Any:
        """The blocking part, called in a thread; `side` is "query" or "target". MediaError or EmbedderError if the row
        cannot be embedded."""
        return self._processor.encode(inputs)

    async def store(self, key: str, partition_id: str, prepared: Any) -> None:
        """Put what the reward stage needs of the row into TransferQueue; returns when it is there. EmbedderError if it
        has no vector; the message is the cause alone, to count rows by."""
        # A put for each row: what rows hold differs in length.
        fields = prepared.to_tensordict()
        await tq.async_kv_batch_put(keys=[key], partition_id=partition_id, fields=fields, tags=[{}])


class EmbeddedRows(RowBackend):
    """Backends `server` and `sentence_transformers`: the vector, of an Embedder that takes rows one by one.

    A put takes four round trips whatever it holds. With one for each row, hundreds of rows would queue up, and the last
    rollouts wait for seconds; so vectors that come while a put is under way go together in the next one.
    """

    def __init__(self, embedder: ServedEmbedder | SentenceClient) -> None:
        self._embedder = embedder
        self._put: Gatherer[tuple[str, str, torch.Tensor], None] = Gatherer(
            _put, kind=lambda row: (row[1], len(row[2]))
        )

    def prepare(self, inputs: EmbedInput, side: str) -> Any:
        return self._embedder.prepare(inputs, side)

    async def store(self, key: str, partition_id: str, prepared: Any) -> None:
        vector = await self._embedder.embed(prepared)
        await self._put((key, partition_id, vector.float()))


async def _put(rows: list[tuple[str, str, torch.Tensor]]) -> list[None]:
    """Vectors of one partition and width: (key, partition, (D,))."""
    await tq.async_kv_batch_put(
        keys=[key for key, _, _ in rows],
        partition_id=rows[0][1],
        fields=TensorDict({VECTOR: torch.stack([vector for _, _, vector in rows])}, batch_size=[len(rows)]),
        tags=[{} for _ in rows],
    )
    return [None] * len(rows)


def row_backend(config: EmbedderConfig, *, max_frames: int, processes: int) -> RowBackend:
    """The backend of the section `embedrl.embedder` for one of `processes` agent-loop workers."""
    if config.backend == "worker":
        return RowBackend(processor_for(config, max_frames=max_frames))
    if config.backend == "server":
        from embedrl_verl.embedder.served.client import ServedEmbedder

        return EmbeddedRows(ServedEmbedder(config, processor_for(config, max_frames=max_frames), share=processes))
    from embedrl_verl.embedder.sentence import SentenceClient

    return EmbeddedRows(SentenceClient(config, max_frames=max_frames))


def read_vectors(keys: Sequence[str], partition_id: str) -> torch.Tensor:
    """The vectors (N, D) that lie in TransferQueue, in the order of `keys`."""
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
    return torch.stack(rows)


class QueuedVectors:
    """Reads the vectors that agent loops have put into TransferQueue; stands where the worker's client would.

    Args:
        owner: held for as long; Ray ends an actor that nobody holds, though agent loops find it by its name.
        watch: called at every read.
    """

    def __init__(self, owner: Any = None, watch: Callable[[], None] = lambda: None) -> None:
        self._owner, self._watch = owner, watch

    def embed_rows(self, keys: Sequence[str], partition_id: str, *, averaged: bool = False) -> Embedded:
        """The rows' vectors."""
        if not keys or averaged:
            raise EmbedderError(
                "rows of a frozen Embedder are read by their keys; got none, or an average was asked for"
            )
        self._watch()
        return Embedded.of(unit(read_vectors(keys, partition_id)))


@dataclass(frozen=True)
class StreamedEmbedder:
    """An Embedder that is being started.

    `ready` waits for it and checks it against the run's data sets: EmbedderError if it does not start or gives other
    vectors than the Embedder, ConfigError if it does not take the media of the data.
    """

    where: str  # for the log
    ready: Callable[[Sequence[Any]], QueuedVectors]


def start_streamed_embedder(run_config: Any, config: EmbedderConfig) -> StreamedEmbedder | None:
    """Start the Embedder of the section; None for backend `worker`.

    Servers that the run starts are written into `run_config.embedrl.embedder.server.urls`, where agent loops read them.
    """
    if config.backend == "worker":
        return None
    if config.backend == "server":
        return _start_servers(run_config, config)
    from embedrl_verl.embedder.sentence import refuse_media, start_sentence_actor

    actor = start_sentence_actor(config)

    def ready(datasets: Sequence[Any]) -> QueuedVectors:
        modalities, images, videos = ray.get(actor.takes.remote())
        for dataset in datasets:
            refuse_media(dataset, modalities, images=images, videos=videos, path=str(config.path))
        return QueuedVectors(actor)

    return StreamedEmbedder("sentence-transformers", ready)


def _start_servers(run_config: Any, config: EmbedderConfig) -> StreamedEmbedder:
    from embedrl_verl.embedder.served.client import check_servers
    from embedrl_verl.embedder.served.servers import ServerFleet

    processor = processor_for(config, max_frames=MediaConfig.from_config(run_config.data).max_frames)
    if config.server.urls:
        check_servers(config, processor, config.server.urls)
        return StreamedEmbedder(f"server(s) {', '.join(config.server.urls)}", lambda datasets: QueuedVectors())
    fleet = ServerFleet(config, processor, on_cpu=run_config.trainer.device == "cpu")
    run_config.embedrl.embedder.server.urls = fleet.urls
    known: list[tuple[int, str | None]] = [(0, None)] * len(fleet.urls)

    def watch() -> None:
        """Say in the trainer's log what has become of the servers."""
        found = fleet.states()
        for url, before, (restarts, failure) in zip(fleet.urls, known, found, strict=True):
            if before != (restarts, failure):
                logger.warning("embedding server %s: %s", url, failure or f"started again {restarts} time(s) so far")
        known[:] = found

    def ready(datasets: Sequence[Any]) -> QueuedVectors:
        fleet.wait_ready()
        check_servers(config, processor, fleet.urls)
        return QueuedVectors(fleet, watch)

    return StreamedEmbedder(f"server(s) {', '.join(fleet.urls)}", ready)
