# SPDX-License-Identifier: Apache-2.0
"""Sends rows to embedding servers, from the process in which they become ready.

    embedder = ServedEmbedder(config, processor, share=8)
    request = embedder.prepare(EmbedInput(item, tcot, evidence))     # in a thread
    vector = await embedder.embed(request)                           # float32 (D,), length 1

A row that no server embeds raises; there is no stand-in for its vector.
"""

from __future__ import annotations

import logging
import os
import time

import torch

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served.command import longest_prompt
from embedrl_verl.embedder.served.requests import PATH, EmbedRequest, embed_request, read_vector
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.serving import PoolSettings, ServerError, ServerPool

logger = logging.getLogger(__name__)
NAME = "embedding server"


def open_pool(config: EmbedderServerConfig, urls: tuple[str, ...] | None = None, *, share: int = 1) -> ServerPool:
    """A pool over `urls` (None: those of the section) with one of `share` parts of the limit.

    Raises:
        ConfigError: no or malformed URLs, or the variable named by `api_key_env` is not set.
    """
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(
                f"embedrl.embedder.server.api_key_env names the environment variable {config.api_key_env}, which is "
                "not set in this process"
            )
    settings = PoolSettings(
        limit=max(1, config.limit // share),
        timeout_s=config.timeout_s,
        retries=config.retries,
        backoff_s=config.backoff_s,
    )
    return ServerPool(config.urls if urls is None else urls, settings, api_key=key, name=NAME)


class ServedEmbedder:
    """The servers of `embedrl.embedder.server.urls` as an Embedder.

    Args:
        config: the section `embedrl.embedder`.
        processor: for its checkpoint; its longest prompt is set to what the servers take.
        share: processes that send; each has its part of the limit.

    Raises:
        ConfigError: as `open_pool`.
    """

    def __init__(self, config: EmbedderConfig, processor: EmbedProcessor, *, share: int = 1) -> None:
        self._processor = processor
        self._processor.max_length = longest_prompt(config, processor)
        self._deadline_s = config.server.deadline_s
        self.pool = open_pool(config.server, share=share)

    def prepare(self, inputs: EmbedInput, side: str = "") -> EmbedRequest:
        """The request of a row, on both sides alike; blocks, so call it in a thread.

        Raises:
            MediaError, EmbedderError: the row cannot be encoded.
        """
        return embed_request(self._processor, inputs)

    async def embed(self, request: EmbedRequest) -> torch.Tensor:
        """The row's vector: float32 (D,), length 1.

        Raises:
            EmbedderError: no server gave one before the deadline. The message is the cause alone, to count rows by.
        """
        try:
            answer = await self.pool.post(PATH, request.payload, deadline=time.monotonic() + self._deadline_s)
        except ServerError as error:
            logger.warning("a row has no vector: %s", error)
            raise EmbedderError(f"{NAME}: {error.cause}") from error
        return read_vector(answer, request)
