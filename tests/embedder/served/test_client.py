# SPDX-License-Identifier: Apache-2.0
"""What is sent to embedding servers and made of their answers, at a fake one (stock vLLM: test_server.py)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.served.client import ServedEmbedder, _probes, check_servers
from embedrl_verl.errors import EmbedderError
from tests.embedder.inputs import item
from tests.serving.fakes import FakeServer, free_url

WIDTH = 128


@pytest.fixture(scope="module")
def config(checkpoint) -> EmbedderConfig:
    server = EmbedderServerConfig(max_model_len=1024, retries=0, deadline_s=2)
    return EmbedderConfig(path=str(checkpoint()), dtype="float32", backend="server", server=server)


def messages_of(body: Any) -> str:
    return json.dumps(body["messages"], sort_keys=True)


def answering(config: EmbedderConfig, *, longest: int = 1024, added: int = 0, width: int = WIDTH, alike: bool = False):
    """A server that reads the probes as this package does, but for `added` tokens."""
    processor = processor_for(config)
    processor.max_length = config.server.max_model_len
    known = {messages_of(one.payload): one.input_ids.tolist() for one in _probes(processor).values()}

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": longest}]}
        tokens = known[messages_of(body)]
        if path == "/tokenize":
            assert body["add_generation_prompt"] is False and "encoding_format" not in body
            return {"tokens": tokens + [0] * added}
        vector = [0.0] * width
        vector[0 if alike else len(tokens) % width] = 1.0
        return {"data": [{"embedding": vector}], "usage": {"prompt_tokens": len(tokens)}}

    return answer


def at_server(answer: Any, do: Any) -> Any:
    async def run() -> Any:
        async with FakeServer(answer) as server:
            return await asyncio.to_thread(do, server.url)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"longest": 1000}, "is 1000 tokens, and rows may have 1024"),
        ({"added": 1}, r"text probe as \d+ tokens, this package as \d+.*chat template.*embedrl serve-embedder"),
        ({"width": 64}, f"its vectors have 64 numbers; the Embedder's have {WIDTH}"),
        ({"alike": True}, "it gives a text and an image the same vector"),
    ],
)
def test_only_a_server_that_gives_the_embedders_vectors_is_accepted(change, reason, config):
    def check(url: str) -> None:
        check_servers(config, processor_for(config), [url])

    if reason is None:
        at_server(answering(config), check)
    else:
        with pytest.raises(EmbedderError, match=reason):
            at_server(answering(config, **change), check)


def test_a_row_has_its_vector_or_its_cause(config):
    def embed(url: str) -> torch.Tensor:
        served = ServedEmbedder(with_urls(config, url), processor_for(config))

        async def run() -> torch.Tensor:
            async with served.pool:
                return await served.embed(served.prepare(EmbedInput(item("a"))))

        return asyncio.run(run())

    def answer(path: str, body: Any) -> Any:
        tokens = len(processor_for(config).fit(EmbedInput(item("a")))[1])
        return {"data": [{"embedding": [0.6, 0.8]}], "usage": {"prompt_tokens": tokens}}

    assert torch.allclose(at_server(answer, embed), torch.tensor([0.6, 0.8]))
    with pytest.raises(EmbedderError, match="^embedding server: (connection refused|no server is up)$"):
        embed(free_url())


def with_urls(config: EmbedderConfig, url: str) -> EmbedderConfig:
    server = EmbedderServerConfig(urls=(url,), max_model_len=1024, retries=0, deadline_s=2)
    return EmbedderConfig(path=config.path, dtype="float32", backend="server", server=server)
