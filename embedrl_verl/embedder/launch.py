# SPDX-License-Identifier: Apache-2.0
"""Starts what embeds rows while rollouts run (backends `server` and `sentence_transformers`), and proves that it fits.

streamed = start_streamed_embedder(config, section)     # before the actor's start, which it then shares the time with
...
embedder = streamed.ready(train_dataset)                # has the worker client's `embed_rows`
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import ray
import torch

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.embedder.sentence_actor import start_sentence_actor
from embedrl_verl.embedder.served.client import check_servers
from embedrl_verl.embedder.served.servers import ServerFleet
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.embedder.streaming import QueuedVectors
from embedrl_verl.errors import ConfigError

logger = logging.getLogger(__name__)


class StreamedEmbedder(Protocol):
    """An Embedder that is being started. `where` describes it for the log."""

    where: str

    def ready(self, datasets: Sequence[Any]) -> QueuedVectors:
        """Wait for it and check it against the run's data sets.

        Raises:
            EmbedderError: it does not start, or gives other vectors than the Embedder.
            ConfigError: it does not take the media of the data.
        """


def start_streamed_embedder(run_config: Any, config: EmbedderConfig) -> StreamedEmbedder | None:
    """Start the Embedder of the section; None for backend `worker`.

    Servers that the run starts are written into `run_config.embedrl.embedder.server.urls`, where agent loops read them.

    Raises:
        ResourceError: no room for the servers.
        EmbedderError: as `StreamedEmbedder.ready`, for servers that run already.
    """
    if config.backend == "worker":
        return None
    if config.backend == "sentence_transformers":
        return _Sentence(config)
    return _Served(run_config, config)


class _Served:
    def __init__(self, run_config: Any, config: EmbedderConfig) -> None:
        self._config = config
        max_frames = DataSettings.from_config(run_config.data).max_frames
        self._processor = processor_for(config, max_frames=max_frames)
        self._fleet: ServerFleet | None = None
        self._urls = list(config.server.urls)
        if self._urls:
            check_servers(config, self._processor, self._urls)
        else:
            self._fleet = ServerFleet(config, self._processor, on_cpu=run_config.trainer.device == "cpu")
            self._urls = run_config.embedrl.embedder.server.urls = self._fleet.urls
        self.where = f"server(s) {', '.join(self._urls)}"

    def ready(self, datasets: Sequence[Any]) -> QueuedVectors:
        if self._fleet is None:
            return QueuedVectors()
        self._fleet.wait_ready()
        check_servers(self._config, self._processor, self._urls)
        return _WatchedVectors(self._fleet)


class _WatchedVectors(QueuedVectors):
    """Says in the trainer's log what has become of the run's servers."""

    def __init__(self, fleet: ServerFleet) -> None:
        self._fleet = fleet
        self._said: list[tuple[int, str | None]] = [(0, None)] * len(fleet.urls)

    def embed_rows(
        self, keys: Sequence[str], partition_id: str, *, averaged: bool = False
    ) -> tuple[torch.Tensor, dict[int, str]]:
        found = self._fleet.states()
        for url, before, (restarts, failure) in zip(self._fleet.urls, self._said, found, strict=True):
            if before != (restarts, failure):
                logger.warning("embedding server %s: %s", url, failure or f"started again {restarts} time(s) so far")
        self._said = found
        return super().embed_rows(keys, partition_id, averaged=averaged)


class _Sentence:
    def __init__(self, config: EmbedderConfig) -> None:
        self._actor = start_sentence_actor(config)
        self._path = config.path
        self.where = "sentence-transformers"

    def ready(self, datasets: Sequence[Any]) -> QueuedVectors:
        modalities, images, videos = ray.get(self._actor.takes.remote())
        for dataset in datasets:
            refuse_media(dataset, modalities, images=images, videos=videos, path=str(self._path))
        return _OwnedVectors(self._actor)


class _OwnedVectors(QueuedVectors):
    """Holds the actor: Ray ends one that nobody holds, though agent loops find it by its name."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor


def refuse_media(dataset: Any, modalities: Sequence[str], *, images: bool, videos: bool, path: str) -> None:
    """Refuse data whose rows have media that the model does not take.

    Args:
        dataset: a `TCoTDataset`.
        modalities: what the model takes, for the message.
        images, videos: whether it takes them beside text.

    Raises:
        ConfigError: with the first such row.
    """
    for index in range(len(dataset)):
        row = dataset[index]
        item = row["embedrl_item"]
        kind = "images" if item["images"] and not images else "a video" if item["video"] and not videos else None
        if kind:
            raise ConfigError(
                f"the sentence-transformers model {path} takes {', '.join(modalities)}, and {row['embedrl_row']} "
                f"({row['embedrl_side']}) has {kind}. Use a model that reads them, or data of text only"
            )
