# SPDX-License-Identifier: Apache-2.0
"""The run's sentence-transformers model in a Ray actor of its own, and the agent loops' way to it.

The actor embeds what has arrived, at most `batch_size` rows at a time, while rollouts still run.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.media import MediaLimits, fit_image
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.sentence import SentenceModel, SentenceRow, has_profile
from embedrl_verl.embedder.served.command import media_size
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.errors import EmbedderError, ResourceError

logger = logging.getLogger(__name__)
ACTOR = "embedrl_sentence_embedder"
FOREIGN_TOKEN_SIDE = 28
"""Pixels of a visual token's side where the limits of the section are applied to a model of another family."""


class SentenceClient:
    """The agent loop's side: fits a row's media, and asks the actor of the run.

    Raises:
        EmbedderError: the checkpoint and its profile do not fit.
    """

    def __init__(self, config: EmbedderConfig, *, max_frames: int) -> None:
        self._processor = processor_for(config, max_frames=max_frames) if has_profile(config) else None
        self._limits = MediaLimits(
            FOREIGN_TOKEN_SIDE,
            config.image_min_tokens,
            config.image_max_tokens,
            config.frame_min_tokens,
            config.frame_max_tokens,
            max_frames,
        )
        self._actor: Any = None

    def prepare(self, inputs: EmbedInput, side: str) -> SentenceRow:
        """The row as the actor takes it; blocks.

        Raises:
            MediaError, EmbedderError: it cannot be encoded.
        """
        if self._processor is None:
            return SentenceRow(side, inputs=_fitted(inputs, self._limits))
        prepared, _, _ = self._processor.fit(inputs)
        messages = [
            dict(message, content=[_frames_as_images(p) for p in message["content"]]) for message in prepared.messages
        ]
        messages[0]["fitted"] = True  # the exported template need not fear that its end is cut off
        size = {"size": media_size(self._processor)}
        video = dict(size, do_sample_frames=False)
        if prepared.videos:
            video["video_metadata"] = [times.metadata() for _, times in prepared.videos]
        return SentenceRow(side, messages=messages, processing={"image": size, "video": video})

    async def embed(self, row: SentenceRow) -> torch.Tensor:
        """float32 (D,), length 1.

        Raises:
            EmbedderError: the model has no vector for the row, or its process has ended.
        """
        if self._actor is None:
            self._actor = ray.get_actor(ACTOR)
        try:
            vector, reason = await self._actor.embed.remote(row)
        except ray.exceptions.RayError as error:
            logger.warning("a row has no vector: %s", error)
            raise EmbedderError(f"the sentence-transformers process: {type(error).__name__}") from error
        if vector is None:
            raise EmbedderError(reason)
        return torch.tensor(vector)


class _SentenceActor:
    """Gathers rows that arrive one by one into batches; one batch is embedded at a time."""

    def __init__(self, config: EmbedderConfig) -> None:
        on_gpu = config.sentence.n_gpus > 0 and torch.cuda.is_available()
        self._model = SentenceModel(config, "cuda" if on_gpu else "cpu")
        self._batch_size = config.sentence.batch_size
        self._waiting: list[tuple[SentenceRow, asyncio.Future[torch.Tensor | str]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._worker: asyncio.Task[None] | None = None

    async def takes(self) -> tuple[list[str], bool, bool]:
        """What the model takes, and whether text with images, and with a video."""
        return self._model.modalities, self._model.takes("image"), self._model.takes("video")

    async def embed(self, row: SentenceRow) -> tuple[Any, str | None]:
        """The row's vector as numpy float32 (D,), or None and why."""
        future: asyncio.Future[torch.Tensor | str] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._embed_waiting())
        result = await future
        return (None, result) if isinstance(result, str) else (result.numpy(), None)

    async def _embed_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            try:
                results = await loop.run_in_executor(self._thread, self._model.embed, [row for row, _ in batch])
            except Exception as error:  # goes to those who wait; the next batch is tried
                for _, future in batch:
                    if not future.done():  # its call was cancelled
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)


def start_sentence_actor(config: EmbedderConfig) -> Any:
    """The run's actor, loading its model; it ends with the process that started it.

    Raises:
        ResourceError: the cluster has no GPU left for it.
    """
    wanted, free = config.sentence.n_gpus, ray.available_resources().get("GPU", 0.0)
    if free < wanted:
        raise ResourceError(
            f"the sentence-transformers model asks for {wanted} GPU (embedrl.embedder.sentence.n_gpus); the cluster "
            f"has {free:g} left; set it to 0, or add a GPU"
        )
    return (
        ray.remote(_SentenceActor)
        .options(
            name=ACTOR,
            num_cpus=1,
            num_gpus=wanted,
            max_concurrency=4096,
            max_restarts=3,
            max_task_retries=3,
        )
        .remote(config)
    )


def _fitted(inputs: EmbedInput, limits: MediaLimits) -> EmbedInput:
    item = replace(
        inputs.item,
        images=tuple(fit_image(image, limits) for image in inputs.item.images),
        frames=tuple(fit_image(frame, limits, is_frame=True) for frame in inputs.item.frames),
    )
    return replace(inputs, item=item, evidence=tuple(fit_image(image, limits) for image in inputs.evidence))


def _frames_as_images(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "video":
        return part
    return dict(part, video=[Image.fromarray(frame) for frame in part["video"]])
