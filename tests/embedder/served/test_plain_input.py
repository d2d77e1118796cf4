# SPDX-License-Identifier: Apache-2.0
"""A bare text to a served Embedder is embedded with its prompt, or refused; chat requests pass untouched. vLLM's own
routes and request types, without an engine (with one: test_server.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.entrypoints.pooling.embed.api_router import router
from vllm.entrypoints.pooling.embed.protocol import EmbeddingBatchChatRequest, EmbeddingChatRequest

from embedrl_verl.embedder.served.command import PLAIN_INPUT
from embedrl_verl.embedder.served.plain_input import EMBEDDINGS, OTHERS, PlainInput

CHAT = [{"role": "user", "content": "a heron"}]
PARTS = [{"role": "system", "content": "Find it."}, {"role": "user", "content": [{"type": "text", "text": "é"}]}]


@pytest.fixture
def seen() -> list[Any]:
    """What vLLM's handler was given: request and raw body."""
    return []


@pytest.fixture
def client(seen) -> TestClient:
    app = FastAPI()
    app.include_router(router)

    async def handler(request: Any, raw: Request) -> JSONResponse:
        seen.append((request, await raw.body()))
        return JSONResponse({})

    app.state.serving_embedding = handler
    app.state.enable_server_load_tracking = False

    @app.post("/{path:path}")
    async def others(raw: Request) -> JSONResponse:
        seen.append((None, await raw.body()))
        return JSONResponse({})

    app.add_middleware(PlainInput)
    return TestClient(app)


@pytest.mark.parametrize("text", ["a heron", "", '{"messages": []}', "<|im_end|>\n字" * 3000])
def test_a_text_is_a_chat_request_with_all_other_settings(text, client, seen):
    asked = {"input": text, "model": "m", "dimensions": 32, "encoding_format": "base64", "user": "u"}
    assert client.post(EMBEDDINGS, json=asked).status_code == 200
    ((request, _),) = seen
    assert type(request) is EmbeddingChatRequest
    assert request.messages == [{"role": "user", "content": text}]
    assert (request.model, request.dimensions, request.encoding_format, request.user) == ("m", 32, "base64", "u")


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "a"], ["", "<emb>", "字"]])
def test_texts_are_a_batch_of_chat_requests_in_order(texts, client, seen):
    assert client.post(EMBEDDINGS, json={"input": texts}).status_code == 200
    ((request, _),) = seen
    assert type(request) is EmbeddingBatchChatRequest
    assert request.messages == [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": CHAT},
        {"messages": PARTS, "encoding_format": "base64", "truncate_prompt_tokens": 5},
        {"messages": [CHAT, PARTS]},
        {"input": CHAT},
        {"input": [CHAT, PARTS]},
    ],
)
def test_a_chat_request_passes_to_the_byte(asked, client, seen):
    body = json.dumps(asked, indent=3, ensure_ascii=False).encode()
    assert client.post(EMBEDDINGS, content=body, headers={"content-type": "application/json"}).status_code == 200
    assert seen[0][1] == body


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"input": [1, 2, 3]}, r"input must be a text or a list of texts; got \[1, 2, 3\]"),
        ({"input": [[1, 2], [3]]}, "input must be a text or a list of texts"),
        ({"input": ["a", 1]}, "input must be a text or a list of texts"),
        ({"input": []}, "input must be a text or a list of texts"),
        ({"input": None}, "input must be a text or a list of texts; got null"),
        ({"input": "a", "messages": CHAT}, "got both"),
        ({"input": "a", "truncate_prompt_tokens": -1}, "truncate_prompt_tokens must be left out.*; got -1"),
    ],
)
def test_what_would_be_read_without_the_prompt_is_refused_with_the_way_to_ask(asked, reason, client, seen):
    answer = client.post(EMBEDDINGS, json=asked)
    assert answer.status_code == 400 and not seen
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.json()["error"]["message"])


@pytest.mark.parametrize("path", sorted(OTHERS))
def test_no_other_address_embeds_a_bare_text(path, client, seen):
    for asked in ({"input": "a"}, {"texts": ["a"]}, {"text_1": "a", "text_2": "b"}, {"query": "a", "documents": ["b"]}):
        if path == "/v2/embed" and "texts" not in asked:
            continue
        answer = client.post(path, json=asked)
        assert answer.status_code == 400 and not seen
        assert path in answer.text and '/v1/embeddings: a text, or a list of texts, as \\"input\\"' in answer.text
    if path != "/v2/embed":
        assert client.post(path, json={"messages": CHAT}).status_code == 200 and len(seen) == 1


def test_what_is_no_json_object_and_other_requests_are_vllms_affair(client, seen):
    for body in (b"{", b"{}", b"\xff", b"", b"[" * 5000):
        answer = client.post(EMBEDDINGS, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
    assert client.get("/v1/embeddings").status_code == 405
    assert len(seen) == 1


def test_the_servers_command_names_the_class():
    assert f"{PlainInput.__module__}.{PlainInput.__qualname__}" == PLAIN_INPUT
