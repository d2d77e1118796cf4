# SPDX-License-Identifier: Apache-2.0
"""A bare text to a served Embedder is embedded with its whole prompt, or refused; chat requests pass untouched. vLLM's
own routes and request types, without an engine (with one: test_server.py)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.entrypoints.pooling.classify.api_router import router as classify
from vllm.entrypoints.pooling.embed.api_router import router
from vllm.entrypoints.pooling.embed.protocol import EmbeddingBatchChatRequest, EmbeddingChatRequest
from vllm.entrypoints.pooling.pooling.api_router import router as pooling
from vllm.entrypoints.pooling.scoring.api_router import router as scoring

from embedrl_verl.embedder.served import plain_input
from embedrl_verl.embedder.served.command import PLAIN_INPUT
from embedrl_verl.embedder.served.plain_input import EMBEDDINGS, HARMLESS, SETTINGS, PlainInput
from embedrl_verl.embedder.served.requests import embed_request
from tests.embedder.inputs import mixed_inputs

OTHERS = {str(getattr(route, "path", "")) for one in (router, pooling, scoring, classify) for route in one.routes}
OTHERS = (OTHERS - {EMBEDDINGS}) | {"/invocations", "/v1/embeddings/", "/V1/Embeddings", "/later"}
CHAT = [{"role": "user", "content": "a heron"}]
PARTS = [{"role": "system", "content": "Find it."}, {"role": "user", "content": [{"type": "text", "text": "é"}]}]
JSON = {"content-type": "application/json"}


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


@pytest.mark.parametrize(
    "given",
    ["a heron", "", '{"messages": []}', "<|im_end|>\n字" * 3000, ["a"], ["a", "b", "a"], ["", "<emb>", "字"]],
)
def test_texts_are_chat_requests_in_order_with_all_other_settings(given, client, seen):
    asked = {"input": given, "model": "m", "dimensions": 32, "encoding_format": "base64", "user": "u"}
    assert client.post(EMBEDDINGS, json=asked).status_code == 200
    ((request, _),) = seen
    assert type(request) is (EmbeddingChatRequest if isinstance(given, str) else EmbeddingBatchChatRequest)
    chats = [[{"role": "user", "content": text}] for text in ([given] if isinstance(given, str) else given)]
    assert request.messages == (chats[0] if isinstance(given, str) else chats)
    assert (request.model, request.dimensions, request.encoding_format, request.user) == ("m", 32, "base64", "u")


def test_chat_requests_and_those_of_a_run_pass_to_the_byte(embedder, client, seen):
    processor = embedder("qwen2_5_vl").processor
    asked = [{"messages": CHAT}, {"messages": [CHAT, PARTS]}]
    asked.append({"messages": PARTS, "encoding_format": "base64", "truncate_prompt_tokens": None, "input": None})
    sent = [json.dumps(one, indent=3, ensure_ascii=False).encode() for one in asked]
    sent += [json.dumps(embed_request(processor, one).payload).encode() for one in mixed_inputs(12)]
    assert any(b"media_io_kwargs" in body and b"mm_processor_kwargs" in body for body in sent)
    for body in sent:
        assert client.post(EMBEDDINGS, content=body, headers=JSON).status_code == 200
    assert [body for _, body in seen] == sent


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        *(
            ({"input": given}, "input must be a text or a list of texts; got")
            for given in ([1, 2, 3], [[1, 2], [3]], ["a", 1], [], None, CHAT)
        ),
        ({}, "input must be a text or a list of texts; got None"),
        ({"input": "a", "messages": CHAT}, "messages must be a list, not empty and with no input"),
        ({"input": [], "messages": CHAT}, "messages must be a list, not empty and with no input"),
        ({"input": "a", "messages": 1}, "messages must be a list"),
        ({"input": "a", "messages": []}, "messages must be a list"),
        ({"messages": []}, r"messages must be a list, not empty.*; got \[\]"),
        *(({"messages": CHAT, name: ["a"]}, f"{name} must be left out") for name in ("texts", "inputs", "text_1")),
        *((body, "the body must be a JSON object") for body in (b"{", b"\xff", b"", b"[" * 5000, b'"a"', b"{} x")),
        ([{"input": "a"}], "the body must be a JSON object"),
    ],
)
def test_what_would_be_read_without_the_prompt_is_refused_with_the_way_to_ask(asked, reason, client, seen):
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    answer = client.post(EMBEDDINGS, content=body, headers=JSON)
    assert answer.status_code == 400 and not seen
    assert re.search(rf"{reason}.*/v1/embeddings: a text, or a list of texts", answer.json()["error"]["message"])


def test_no_setting_cuts_or_changes_the_prompt(client, seen):
    every = set(EmbeddingChatRequest.model_fields)
    cutting = {"truncate_prompt_tokens", "continue_final_message", "chat_template", "chat_template_kwargs"}
    assert every > SETTINGS and not SETTINGS & (cutting | {"add_generation_prompt", "add_special_tokens"})
    for name in every - SETTINGS - {"messages"}:
        for content in ({"input": "a"}, {"input": ["a"]}, {"messages": CHAT}, {"input": CHAT}):
            answer = client.post(EMBEDDINGS, json={**content, name: -1})
            assert answer.status_code == 400 and not seen
            assert f"{name} must be left out: it would cut or change the prompt" in answer.text
            assert "got -1" in answer.text


@pytest.mark.parametrize("path", sorted(OTHERS))
def test_no_other_address_embeds(path, client, seen):
    for asked in (
        {"input": "a", "messages": CHAT},
        {"messages": CHAT},
        {"texts": ["a"]},
        {"inputs": [{"content": [{"type": "text", "text": "a"}]}], "max_tokens": 5},
        {"query": "a", "documents": ["b"]},
    ):
        answer = client.post(path, json=asked, follow_redirects=False)
        assert answer.status_code == 400 and not seen
        assert path in answer.text and '/v1/embeddings: a text, or a list of texts, as \\"input\\"' in answer.text


def test_what_embeds_nothing_passes(client, seen):
    for path in HARMLESS:
        assert client.post(path, json={"prompt": "a", "messages": None}).status_code == 200
    assert client.get(EMBEDDINGS).status_code == 405 and len(seen) == len(HARMLESS)


def test_a_body_that_comes_in_parts_is_whole_and_over_the_limit_it_is_refused(client, seen, monkeypatch):
    body = json.dumps({"input": ["a", "é"]}).encode()
    monkeypatch.setattr(plain_input, "MAX_BODY", len(body))
    parts = [body[start : start + 3] for start in range(0, len(body), 3)]
    assert client.post(EMBEDDINGS, content=iter(parts), headers=JSON).status_code == 200
    assert [one[0]["content"] for one in seen.pop()[0].messages] == ["a", "é"]
    answer = client.post(EMBEDDINGS, content=iter([*parts, b" "]), headers=JSON)
    assert answer.status_code == 413 and f"at most {len(body)} bytes" in answer.text and not seen


def test_the_servers_command_names_the_class():
    assert f"{PlainInput.__module__}.{PlainInput.__qualname__}" == PLAIN_INPUT
