# SPDX-License-Identifier: Apache-2.0
"""Sends rows to embedding servers, from the process in which they become ready, and proves first that these fit.

    check_servers(config, processor, urls)                           # once, before the first step
    embedder = ServedEmbedder(config, processor, share=8)
    request = embedder.prepare(EmbedInput(item, tcot, evidence))     # in a thread
    vector = await embedder.embed(request)                           # float32 (D,), length 1

A row that no server embeds raises; there is no stand-in for its vector.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.data.media import LoadedItem
from embedrl_verl.data.video import list_times
from embedrl_verl.embedder.loading import load_config
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served.command import longest_prompt
from embedrl_verl.embedder.served.requests import PATH, EmbedRequest, embed_request, read_vector
from embedrl_verl.errors import EmbedderError, ModelFailedError
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.tcot import parse_tcot

logger = logging.getLogger(__name__)
NAME = "embedding server"
_TCOT = '<thinking>A probe. {"text_keywords": ["probe"]}</thinking>\n<rethink>Yes.</rethink>\n<answer>probe</answer>'
_SAME = 1 - 1e-6
_TOKENIZE = ("messages", "media_io_kwargs", "mm_processor_kwargs")


def open_pool(config: EmbedderServerConfig, urls: Sequence[str] | None = None, *, share: int = 1) -> ServerPool:
    """A pool over `urls` (None: those of the section) with one of `share` parts of the limit."""
    urls = config.urls if urls is None else urls
    return ServerPool.from_config(config, urls, section="embedrl.embedder.server", name=NAME, share=share)


class ServedEmbedder:
    """The servers of `embedrl.embedder.server.urls` as an Embedder.

    Args:
        config: the section `embedrl.embedder`.
        processor: for its checkpoint; its longest prompt is set to what the servers take.
        share: processes that send; each has its part of the limit.
    """

    def __init__(self, config: EmbedderConfig, processor: EmbedProcessor, *, share: int = 1) -> None:
        self._processor = processor
        self._processor.max_length = longest_prompt(config, processor)
        self._deadline_s = config.server.deadline_s
        self.pool = open_pool(config.server, share=share)

    def prepare(self, inputs: EmbedInput, side: str = "") -> EmbedRequest:
        """The request of a row, on both sides alike; blocks, so call it in a thread."""
        return embed_request(self._processor, inputs)

    async def embed(self, request: EmbedRequest) -> torch.Tensor:
        """The row's vector: float32 (D,), length 1.

        Raises:
            EmbedderError: no server gave one before the deadline (ModelFailedError unless they refused the row). The
                message is the cause alone, to count rows by.
        """
        try:
            answer = await self.pool.post(PATH, request.payload, deadline=time.monotonic() + self._deadline_s)
        except ServerError as error:
            logger.warning("a row has no vector: %s", error)
            kind = ModelFailedError if error.transient else EmbedderError
            raise kind(f"{NAME}: {error.cause}") from error
        return read_vector(answer, request)


def check_servers(config: EmbedderConfig, processor: EmbedProcessor, urls: Sequence[str]) -> None:
    """Prove that every server gives the Embedder's own vectors; blocks.

    Each tokenises probes (text, images of the smallest and largest size, a video) and must come to the tokens that
    `EmbedProcessor` comes to; then it embeds two of them.
    """
    processor.max_length = longest_prompt(config, processor)
    requests = _probes(processor)
    width = int(load_config(str(config.path)).get_text_config().hidden_size)

    async def check(url: str) -> None:
        async with open_pool(config.server, (url,)) as pool:
            try:
                await _check_length(pool, processor.max_length)
                for name, request in requests.items():
                    await _check_tokens(pool, name, request)
                await _check_vectors(pool, requests, width)
            except (ServerError, EmbedderError) as error:
                raise EmbedderError(
                    f"{NAME} {pool.urls[0]}: {error}. A server that fits is started by "
                    f"`{_serve_line(config, processor)}`; with --print it shows the arguments of vllm serve"
                ) from error

    async def check_all() -> None:
        await asyncio.gather(*map(check, urls))

    asyncio.run(check_all())


def _probes(processor: EmbedProcessor) -> dict[str, EmbedRequest]:
    """Requests by name that exercise template, image limits and video. What cannot be encoded is not among them: such
    rows are refused before they are sent."""

    def image(width: int, height: int) -> Image.Image:
        return Image.linear_gradient("L").resize((width, height)).convert("RGB")

    def item(text: str, *images: Image.Image, frames: tuple[Image.Image, ...] = ()) -> LoadedItem:
        return LoadedItem(
            text, "Represent the probe.", images, frames, list_times(2.0, len(frames)) if frames else None
        )

    side = 4 * processor.limits.token_side * (1 + int(processor.limits.image_max_tokens**0.5))
    large, strip, tcot = image(side, side), image(120, 12), parse_tcot(_TCOT)
    found = {"text": embed_request(processor, EmbedInput(item("What is written here?"), tcot))}
    for name, inputs in {
        "small image": EmbedInput(item("Look.", image(8, 8)), tcot, (strip,)),
        "large images": EmbedInput(item("", large, strip)),
        "video": EmbedInput(item("Watch.", frames=(large,) * 3)),
    }.items():
        try:
            found[name] = embed_request(processor, inputs)
        except EmbedderError:
            continue
    return found


def _serve_line(config: EmbedderConfig, processor: EmbedProcessor) -> str:
    """The command that starts a server for this section."""
    words: list[Any] = ["embedrl", "serve-embedder", config.path, "--profile", config.profile, "--dtype", config.dtype]
    words += ["--image-tokens", config.image_min_tokens, config.image_max_tokens]
    words += ["--frame-tokens", config.frame_min_tokens, config.frame_max_tokens]
    words += ["--max-frames", processor.limits.max_frames, "--max-model-len", config.server.max_model_len]
    return shlex.join(map(str, words))


async def _check_length(pool: ServerPool, longest: int) -> None:
    models = await pool.models()
    if not models:
        raise EmbedderError("/v1/models must list a model; got none")
    found = models[0].get("max_model_len")
    if found is not None and found < longest:
        raise EmbedderError(
            f"its longest prompt (--max-model-len) is {found} tokens, and rows may have {longest}; "
            "raise it, or lower embedrl.embedder.server.max_model_len"
        )


async def _check_tokens(pool: ServerPool, name: str, request: EmbedRequest) -> None:
    # Unlike /v1/embeddings, /tokenize opens an assistant turn unless told not to.
    payload = {key: request.payload[key] for key in _TOKENIZE if key in request.payload}
    answer = await pool.post("/tokenize", {**payload, "add_generation_prompt": False})
    found, expected = answer["tokens"], request.input_ids.tolist()
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    limits = name != "text" and len(found) != len(expected)
    raise EmbedderError(
        f"it reads the {name} probe as {len(found)} tokens, this package as {len(expected)}; they differ from token "
        f"{at} on, so its {'image limits (--mm-processor-kwargs)' if limits else 'chat template'} or its tokenizer is "
        "another"
    )


async def _check_vectors(pool: ServerPool, requests: dict[str, EmbedRequest], width: int) -> None:
    vectors: list[torch.Tensor] = []
    for name in ("text", "small image"):
        if name in requests:
            vectors.append(read_vector(await pool.post(PATH, requests[name].payload), requests[name]))
            if len(vectors[-1]) != width:
                raise EmbedderError(f"its vectors have {len(vectors[-1])} numbers; the Embedder's have {width}")
    if len(vectors) == 2 and float(vectors[0] @ vectors[1]) > _SAME:
        raise EmbedderError(
            "it gives a text and an image the same vector; it must pool the last token (--pooler-config)"
        )
