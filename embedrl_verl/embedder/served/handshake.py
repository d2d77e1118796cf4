# SPDX-License-Identifier: Apache-2.0
"""Proof, before the first step, that a server gives the Embedder's own vectors.

Each server is asked to tokenise probes (text, images of the smallest and largest size, a video) and must come to the
tokens that `EmbedProcessor` comes to; then to embed two of them.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence

import torch
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.media import LoadedItem
from embedrl_verl.data.video import list_times
from embedrl_verl.embedder.loading import load_config
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.served.client import NAME, open_pool
from embedrl_verl.embedder.served.command import longest_prompt
from embedrl_verl.embedder.served.requests import PATH, EmbedRequest, embed_request, read_vector
from embedrl_verl.errors import EmbedderError
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.tcot import parse_tcot

_TCOT = '<thinking>A probe. {"text_keywords": ["probe"]}</thinking>\n<rethink>Yes.</rethink>\n<answer>probe</answer>'
_SAME = 1 - 1e-6
_TOKENIZE = ("messages", "media_io_kwargs", "mm_processor_kwargs")


def probes(processor: EmbedProcessor) -> dict[str, EmbedRequest]:
    """Requests by name that exercise template, image limits and video. What cannot be encoded is not among them: such
    rows are refused before they are sent."""
    side = 4 * processor.limits.token_side * (1 + int(processor.limits.image_max_tokens**0.5))
    small, large = _image(8, 8), _image(side, side)
    strip, frames = _image(120, 12), tuple(_image(side, side) for _ in range(3))
    inputs = {
        "text": EmbedInput(_item("What is written here?"), parse_tcot(_TCOT)),
        "small image": EmbedInput(_item("Look.", (small,)), parse_tcot(_TCOT), (strip,)),
        "large images": EmbedInput(_item("", (large, strip))),
        "video": EmbedInput(_item("Watch.", frames=frames)),
    }
    found = {}
    for name, one in inputs.items():
        try:
            found[name] = embed_request(processor, one)
        except EmbedderError:
            if name == "text":
                raise
    return found


def check_servers(config: EmbedderConfig, processor: EmbedProcessor, urls: Sequence[str]) -> None:
    """Check every server, all at once; blocks.

    Raises:
        EmbedderError: one does not answer, reads other prompts, or gives vectors of another width; the message names it
            and says how to start it.
    """
    processor.max_length = longest_prompt(config, processor)
    requests = probes(processor)

    async def run() -> None:
        await asyncio.gather(*(_check(config, processor, requests, url) for url in urls))

    asyncio.run(run())


def serve_line(config: EmbedderConfig, max_frames: int) -> str:
    """The command that starts a server for this section."""
    words = ["embedrl", "serve-embedder", str(config.path), "--profile", config.profile, "--dtype", config.dtype]
    words += ["--image-tokens", f"{config.image_min_tokens}", f"{config.image_max_tokens}"]
    words += ["--frame-tokens", f"{config.frame_min_tokens}", f"{config.frame_max_tokens}"]
    words += ["--max-frames", f"{max_frames}", "--max-model-len", f"{config.server.max_model_len}"]
    return shlex.join(words)


async def _check(
    config: EmbedderConfig, processor: EmbedProcessor, requests: dict[str, EmbedRequest], url: str
) -> None:
    max_frames = processor.limits.max_frames
    async with open_pool(config.server, (url,)) as pool:
        try:
            await _check_models(pool, processor.max_length)
            for name, request in requests.items():
                await _check_tokens(pool, name, request)
            await _check_vectors(pool, requests, _width(config))
        except (ServerError, EmbedderError) as error:
            raise EmbedderError(
                f"{NAME} {pool.urls[0]}: {error}. A server that fits is started by `{serve_line(config, max_frames)}`; "
                "with --print it shows the arguments of vllm serve"
            ) from error


async def _check_models(pool: ServerPool, longest: int) -> None:
    answer = await pool.get("/v1/models")
    models = answer.get("data") if isinstance(answer, dict) else None
    if not models:
        raise EmbedderError(f"/v1/models must list a model; got {answer!r:.200}")
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
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    reason = (
        "image limits (--mm-processor-kwargs)" if name != "text" and len(found) != len(expected) else "chat template"
    )
    raise EmbedderError(
        f"it reads the {name} probe as {len(found)} tokens, this package as {len(expected)}; they differ from token "
        f"{at} on, so its {reason} or its tokenizer is another"
    )


async def _check_vectors(pool: ServerPool, requests: dict[str, EmbedRequest], width: int) -> None:
    vectors: list[torch.Tensor] = []
    for name in [name for name in ("text", "small image") if name in requests]:
        vector = read_vector(await pool.post(PATH, requests[name].payload), requests[name])
        if len(vector) != width:
            raise EmbedderError(f"its vectors have {len(vector)} numbers; the Embedder's have {width}")
        vectors.append(vector)
    if len(vectors) == 2 and float(vectors[0] @ vectors[1]) > _SAME:
        raise EmbedderError(
            "it gives a text and an image the same vector; it must pool the last token (--pooler-config)"
        )


def _width(config: EmbedderConfig) -> int:
    return int(load_config(str(config.path)).get_text_config().hidden_size)


def _image(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def _item(text: str, images: tuple[Image.Image, ...] = (), frames: tuple[Image.Image, ...] = ()) -> LoadedItem:
    return LoadedItem(text, "Represent the probe.", images, frames, list_times(2.0, len(frames)) if frames else None)
