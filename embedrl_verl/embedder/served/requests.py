# SPDX-License-Identifier: Apache-2.0
"""A row as a chat request to a stock vLLM pooling server, and the vector in its answer.

The messages are those of `build_messages`, with media already at the size at which the model reads them; the server's
chat template (`command`) renders them to the same prompt.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from embedrl_verl.embedder.batching import NOT_FINITE, unit
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.errors import EmbedderError
from embedrl_verl.serving.vllm import clip_part, image_part, request_arguments

PATH = "/v1/embeddings"
OTHER_PROMPT = "the embedding server read another prompt than the row's"
NO_VECTOR = "the embedding server's answer holds no vector"
NOT_NORMAL = "the embedding server's vector is not of length 1"
LENGTH_TOLERANCE = 1e-2
"""How far a vector may be from length 1: bfloat16 rounds by less."""


@dataclass(frozen=True, eq=False)
class EmbedRequest:
    """`payload` is the JSON body; `input_ids` int64 (L,) are the tokens that the server must come to."""

    payload: dict[str, Any]
    input_ids: torch.Tensor


def embed_request(processor: EmbedProcessor, inputs: EmbedInput) -> EmbedRequest:
    """The request of one row. Blocks (decoding, PNG): call it in a thread."""
    prepared, input_ids, _ = processor.fit(inputs)
    payload: dict[str, Any] = {
        "messages": [
            {"role": message["role"], "content": [content_part(part) for part in message["content"]]}
            for message in prepared.messages
        ],
        "encoding_format": "base64",
        "embed_dtype": "float32",
        "endianness": "little",
    }
    if prepared.videos:
        if len(prepared.videos) > 1:
            raise EmbedderError(f"a request can hold one video; the row has {len(prepared.videos)}")
        ((_, times),) = prepared.videos
        payload |= request_arguments(processor.family, times)
    return EmbedRequest(payload, input_ids)


def content_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of `build_messages` (fitted image, or frames as uint8 (T, height, width, 3)) as vLLM's API takes it."""
    if part["type"] == "image":
        return image_part(part["image"])
    if part["type"] == "video":
        return clip_part(map(Image.fromarray, part["video"]))
    return {"type": "text", "text": part["text"]}


def read_vector(answer: Any, request: EmbedRequest) -> torch.Tensor:
    """The vector of an answer: float32 (D,), length 1."""
    try:
        value, tokens = answer["data"][0]["embedding"], answer["usage"]["prompt_tokens"]
        if isinstance(value, list):
            vector = torch.tensor(value, dtype=torch.float32)
        else:
            vector = torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.float32)
    except (LookupError, TypeError, ValueError) as error:  # also base64 of no or of broken numbers
        raise EmbedderError(NO_VECTOR) from error
    if vector.ndim != 1 or not len(vector):
        raise EmbedderError(NO_VECTOR)
    if tokens != len(request.input_ids):
        raise EmbedderError(OTHER_PROMPT)
    made = unit(vector)
    if not made.isfinite().all():
        raise EmbedderError(NOT_FINITE)
    if abs(vector.norm().item() - 1) > LENGTH_TOLERANCE:
        raise EmbedderError(NOT_NORMAL)
    return made
