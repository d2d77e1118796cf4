# SPDX-License-Identifier: Apache-2.0
"""`embedrl serve` over loopback: the library's vectors, requests that share batches, and refusals with a reason."""

import asyncio
import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import ModelFailedError
from embedrl_verl.model import Written, ask_for
from embedrl_verl.retrieval.requests import Refusal, Request
from embedrl_verl.retrieval.service import Limits, Service, application
from tests.embedder.inputs import picture
from tests.retrieval.conftest import words

LIMITS = Limits(batch_size=8, max_inputs=5, max_body=200_000, max_waiting=64)


@pytest.fixture(scope="module")
def service(model):
    return Service(model, "tiny", LIMITS, cut_to=[32])


@contextmanager
def listening(app):
    """A client of the app, over loopback."""
    config = uvicorn.Config(app, port=0, log_level="warning")
    bound, server = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=300) as found:
        yield found
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(service):
    with listening(application(service)) as found:
        yield found


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, **body):
    return client.post("/v1/embeddings", json=body)


def cosine(a, b) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def chat(*parts, system=None):
    messages = [{"role": "user", "content": list(parts)}]
    return ([{"role": "system", "content": system}] if system else []) + messages


def test_vectors_are_those_of_the_library(client, model):
    answer = ask(client, input="a text").json()
    assert set(answer) == {"object", "data", "model", "usage"} and answer["model"] == "tiny"
    (one,) = answer["data"]
    vector, tcot = model.encode_query("a text", return_tcots=True)
    assert cosine(one["embedding"], vector) >= 0.999 and one["tcot"] == tcot and one["object"] == "embedding"
    several = ask(client, input=["a", "b", "c"], think="never", side="document", model="tiny").json()["data"]
    assert [item["index"] for item in several] == [0, 1, 2] and all(item["tcot"] is None for item in several)
    for item, want in zip(several, model.encode_document(["a", "b", "c"], think="never"), strict=True):
        assert cosine(item["embedding"], want) >= 0.999
    image = {"type": "image_url", "image_url": {"url": data_url(picture(3))}}
    messages = chat(image, {"type": "text", "text": "this"}, system="Find it.")
    (shown,) = ask(client, messages=messages, encoding_format="base64").json()["data"]
    vector = np.frombuffer(base64.b64decode(shown["embedding"]), "<f4")
    want = model.encode_query({"text": "this", "image": picture(3)}, prompt="Find it.")
    assert vector.shape == (128,) and cosine(vector, want) >= 0.999


def test_the_clients_of_openai_read_the_answers(client, model):
    from openai import OpenAI

    found = OpenAI(base_url=f"{client.base_url}/v1", api_key="none").embeddings.create(input=["a text"], model="tiny")
    assert cosine(found.data[0].embedding, model.encode_query("a text")) >= 0.999
    assert OpenAI(base_url=f"{client.base_url}/v1", api_key="none").models.list().data[0].id == "tiny"


PICTURE = data_url(picture(1))
REFUSED = {
    "broken JSON": (b"{", 400, "must be JSON"),
    "deep JSON": (b"[" * 100_000, 400, "JSON"),
    "not UTF-8": (b'{"input": "\xff"}', 400, "must be JSON"),
    "a list": (b"[]", 400, "JSON object"),
    "nothing": ({}, 400, "one of input"),
    "both": ({"input": "a", "messages": chat()}, 400, "one of input"),
    "no texts": ({"input": []}, 400, "list of texts"),
    "token ids": ({"input": [1, 2]}, 400, "token ids"),
    "empty text": ({"input": ["a", " "]}, 400, "input 1: .*empty"),
    "half a character": (b'{"input": "\\ud800"}', 400, "surrogate"),
    "unknown field": ({"input": "a", "truncate_prompt_tokens": 3}, 400, "got 'truncate_prompt_tokens'"),
    "unknown side": ({"input": "a", "side": "both"}, 400, "side must be one of query, document"),
    "odd side": ({"input": "a", "side": ["query"]}, 400, "side must be one of query, document"),
    "gate": ({"input": "a", "think": "when_needed"}, 400, "think must be one of always, never"),
    "form": ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format must be"),
    "dimensions": ({"input": "a", "dimensions": 64}, 400, "dimensions must be 32 or 128"),
    "odd dimensions": ({"input": "a", "dimensions": True}, 400, "dimensions must be 32 or 128"),
    "empty": ({"input": ""}, 400, "input 0: .*empty"),
    "another model": ({"input": "a", "model": "gpt"}, 404, "model must be 'tiny'"),
    "many inputs": ({"input": ["a"] * 6}, 413, "5 inputs; got 6"),
    "many bytes": ({"input": "a" * 300_000}, 413, "200000 bytes"),
    "roles": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "assistant"),
    "no messages": ({"messages": "a"}, 400, "list of objects"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, 400, "content must be"),
    "audio": ({"messages": chat({"type": "input_audio"})}, 400, "a part must be"),
    "a part of text": ({"messages": chat("a")}, 400, "a part must be"),
    **{
        url: ({"messages": chat({"type": "image_url", "image_url": {"url": url}})}, 400, "nothing is fetched")
        for url in ("http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/plain;base64,YQ==", "")
    },
    "base64": (
        {"messages": chat({"type": "image_url", "image_url": {"url": PICTURE[:-3] + "!!"}})},
        400,
        r"messages\[0\]\.content\[0\]\.image_url: a picture's base64 is broken",
    ),
    "no picture": ({"messages": chat({"type": "image_url", "image_url": {"url": PICTURE[:62]}})}, 400, "input 0"),
    "system picture": (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}, *chat()]},
        400,
        "a part must be",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_with_its_reason(client, name):
    body, status, words = REFUSED[name]
    answer = client.post("/v1/embeddings", content=body if isinstance(body, bytes) else json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, "invalid_request_error")
    assert re.search(words, error["message"]), error["message"]


def test_concurrent_requests_share_batches_and_get_their_own_vectors(client, model, service):
    texts = [f"text {i}" for i in range(24)]
    before = service.metrics.registry.get_sample_value("embedrl_batch_inputs_count")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: ask(client, input=text, think="never").json(), texts))
    calls = service.metrics.registry.get_sample_value("embedrl_batch_inputs_count") - before
    assert 3 <= calls < 24
    for answer, want in zip(answers, model.encode_query(texts, think="never"), strict=True):
        assert cosine(answer["data"][0]["embedding"], want) >= 0.999


def test_a_client_that_leaves_and_a_model_that_fails_harm_nobody_else(client, service, monkeypatch):
    address = (client.base_url.host, client.base_url.port)
    for sent in (b'{"input": "a"}', b'{"inp'):  # its whole request, or a part of it
        with socket.create_connection(address) as left:
            left.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n" + sent)
    assert ask(client, input="still there").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(service.model, "encodings", lambda *_, **__: 1 / 0)
        answer = ask(client, input="a")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert ask(client, input="still there").status_code == 200 and client.get("/health").status_code == 200
    waiting = service.metrics.registry.get_sample_value
    assert waiting("embedrl_waiting_inputs") == 0


def test_usage_is_the_tokens_that_the_models_read_and_wrote(client, model):
    processor, asks = model.embedder.embedder.processor, [ask_for(text, "query") for text in ("a text", "another one")]
    plain = sum(len(processor.encode(EmbedInput(one.item))) for one in asks)
    usage = ask(client, input=["a text", "another one"], think="never").json()["usage"]
    assert usage == {"prompt_tokens": plain, "total_tokens": plain}
    thought = ask(client, input=["a text", "another one"], think="always").json()
    read = [
        EmbedInput.with_tcot(one.item, item["tcot"], model.family, model.evidence)
        for one, item in zip(asks, thought["data"], strict=True)
    ]
    assert thought["usage"]["prompt_tokens"] == sum(len(processor.encode(one)) for one in read) > plain
    assert thought["usage"]["total_tokens"] == thought["usage"]["prompt_tokens"] + 2 * 12
    assert thought["usage"]["completion_tokens"] == 2 * 12  # an untrained Reasoner does not end before its limit


def test_vectors_are_cut_to_lengths_that_the_embedder_was_trained_for(client):
    for form in ("float", "base64"):
        whole, cut = (
            ask(client, input="a", think="never", dimensions=dim, encoding_format=form).json()["data"][0]["embedding"]
            for dim in (None, 32)
        )
        if form == "base64":
            whole, cut = (np.frombuffer(base64.b64decode(one), "<f4") for one in (whole, cut))
        assert len(cut) == 32 and np.linalg.norm(cut) == pytest.approx(1) and cosine(cut, whole[:32]) > 0.999999


def test_who_has_no_key_learns_nothing_but_that_the_server_lives(service):
    with listening(application(service, "sésame")) as client:
        wrong = ({"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}, {"Host": "a/health?"})
        for headers in ({}, *wrong):
            for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/metrics")):
                answer = client.request(method, path, json={"input": "a"}, headers=headers)
                assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
            assert client.get("/health", headers=headers).status_code == 200
        key = {"Authorization": "Bearer sésame".encode()}
        body = {"input": "a", "think": "never"}
        assert client.post("/v1/embeddings", json=body, headers=key).status_code == 200


def test_what_a_client_that_left_has_asked_for_is_not_embedded(client, service, monkeypatch):
    embedded, may_go = [], threading.Event()
    encodings = service.model.encodings

    def slow(asks, *args, **options):
        embedded.extend(one.item.text for one in asks)
        assert may_go.wait(60)
        return encodings(asks, *args, **options)

    monkeypatch.setattr(service.model, "encodings", slow)
    waiting = lambda: service.metrics.registry.get_sample_value("embedrl_waiting_inputs")  # noqa: E731
    with ThreadPoolExecutor() as pool:
        first = []
        for number in (1, 2):  # batches at a time
            first.append(pool.submit(ask, client, input="first", think="never"))
            until(lambda number=number: len(embedded) == number)
        body = b'{"input": "left", "think": "never"}'
        with socket.create_connection((client.base_url.host, client.base_url.port)) as left:
            left.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: waiting() == 3)
        until(lambda: waiting() == 2)
        last = pool.submit(ask, client, input="last", think="never")
        until(lambda: waiting() == 3)
        may_go.set()
        assert [one.result().status_code for one in (*first, last)] == [200] * 3
    assert embedded == ["first", "first", "last"] and waiting() == 0


def until(holds):
    """Wait for it, a minute at most."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_model_that_is_away_is_no_fault_of_the_input_and_gives_no_vector(client, service, monkeypatch):
    with monkeypatch.context() as patch:
        lost = lambda inputs, side: [ModelFailedError("embedding server: connection refused")] * len(inputs)  # noqa: E731
        patch.setattr(service.model.embedder, "vectors", lost)
        for think in ("never", "always"):
            answer = ask(client, input="a", think=think)
            assert answer.status_code == 502 and answer.json()["error"]["type"] == "server_error"
            assert "connection refused" in answer.json()["error"]["message"]
    with monkeypatch.context() as patch:
        lost = lambda asks: [Written(None, problem="HTTP 500", is_input_fault=False)] * len(asks)  # noqa: E731
        patch.setattr(service.model.reasoner, "write", lost)
        assert ask(client, input="a").status_code == 502
        assert ask(client, input="a", think="never").status_code == 200
    assert ask(client, input="a").status_code == 200


def test_small_files_of_large_pictures_are_refused_before_they_are_decoded(client, service, monkeypatch):
    image = {"type": "image_url", "image_url": {"url": data_url(Image.new("L", (7000, 7000)))}}
    answer = ask(client, messages=chat(image, image))
    assert answer.status_code == 413 and "98000000" in answer.json()["error"]["message"]
    bomb = {"type": "image_url", "image_url": {"url": data_url(Image.new("1", (20_000, 20_000)))}}
    assert ask(client, messages=chat(bomb)).status_code == 413
    monkeypatch.setattr(service, "limits", replace(LIMITS, max_pixels=7000))
    assert ask(client, messages=chat({"type": "image_url", "image_url": PICTURE})).status_code == 200
    monkeypatch.setattr(service, "limits", replace(LIMITS, max_pixels=6000))
    assert ask(client, messages=chat({"type": "image_url", "image_url": PICTURE})).status_code == 503


def test_too_many_that_wait_are_refused_with_503(client, service, monkeypatch):
    monkeypatch.setattr(service, "_waiting", LIMITS.max_waiting)
    answer = ask(client, input="a")
    assert answer.status_code == 503 and "try again later" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_metrics_are_in_the_form_of_prometheus_and_count_what_happened(client):
    from prometheus_client.parser import text_string_to_metric_families

    def value(name: str, **labels: str) -> float:
        text = client.get("/metrics").text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return next((one.value for one in samples if one.name == name and one.labels == labels), 0.0)

    def counts() -> tuple[float, float, float]:
        return (
            value("embedrl_requests_total", status="200"),
            value("embedrl_requests_total", status="400"),
            value("embedrl_inputs_total", side="target", think="never"),
        )

    before = counts()
    ask(client, input=["a", "b"], think="never", side="document")
    ask(client)
    assert counts() == (before[0] + 1, before[1] + 1, before[2] + 2)


def test_the_command_serves_and_ends_when_it_is_told_to(pair, model):
    run = [sys.executable, "-m", "embedrl_verl.cli", "serve", "--port", "0", *words(pair, reasoner=True)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving embedder at http://127.0.0.1:")
            (item,) = httpx.post(line.split()[-1], json={"input": "a text"}, timeout=300).json()["data"]
            vector, tcot = model.encode_query("a text", return_tcots=True)
            assert cosine(item["embedding"], vector) >= 0.999 and item["tcot"] == tcot
        finally:
            process.terminate()
        process.wait(timeout=300)


def test_pictures_of_a_client_that_left_count_until_they_are_decoded(model, monkeypatch):
    service, may_go = Service(model, "tiny", replace(LIMITS, max_waiting=2)), threading.Event()
    decode = service._asks
    monkeypatch.setattr(service, "_asks", lambda request: may_go.wait(60) and decode(request))
    request = Request([{"text": "a"}] * 2, "query", "never", 128, False)

    async def leave() -> None:
        first = asyncio.ensure_future(service.encodings(request, "never"))
        while not service._waiting:
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(Refusal, match="2 inputs wait already"):
            await service.encodings(request, "never")
        may_go.set()
        while service._waiting:
            await asyncio.sleep(0.01)
        assert len((await service.encodings(request, "never"))[1]) == 2

    asyncio.run(asyncio.wait_for(leave(), 60))
