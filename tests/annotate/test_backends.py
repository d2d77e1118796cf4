# SPDX-License-Identifier: Apache-2.0
"""A request's own failure is an outcome of its row; wrong settings and lost servers stop the job."""

import asyncio
import base64
import io
import time
from collections import Counter

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from embedrl_verl.annotate.backends import Refused, Reply, ServerBackend, ServersLost, encode, read_reply
from embedrl_verl.annotate.prompts import Prompt, Sampling
from embedrl_verl.errors import ConfigError
from tests.annotate.fakes import PROMPTS, pairs
from tests.serving.fakes import FakeServer, free_url, quick_pool

SAMPLING = Sampling(max_tokens=16, temperature=0.5, top_p=0.9, seed=7, choices=("yes", "no"))
HELLO = Prompt([{"role": "user", "content": "hello"}])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("embedrl_verl.annotate.backends._PAUSE_S", 0.05)


def completion(text="hi", reason="stop", usage=(3, 2)):
    counts = usage and dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": counts}


def status(code, **fields):
    return lambda body: web.json_response(fields, status=code)


async def ask(backend, server, prompt=HELLO):
    """What is served, a reply, and the body of its request."""
    facts = await backend.connect()
    request, _ = backend.prepare(prompt, SAMPLING)
    return facts, await backend.complete(request), next(filter(None, server.bodies))


def ask_many(count, before=lambda server: asyncio.sleep(0)):
    """Replies, or what was raised instead."""

    async def do(backend, server):
        await backend.connect()
        request, _ = backend.prepare(HELLO, SAMPLING)
        await before(server)
        return await asyncio.gather(*(backend.complete(request) for _ in range(count)), return_exceptions=True)

    return do


def talk(chat=lambda body: completion(), do=ask, vllm=False, urls=(), models=None, **fields):
    """Run `do(backend, server)` against a server of one model, of which `chat(body)` is the answer."""
    listed = {"data": [{"id": "m", "owned_by": "vllm" if vllm else "somebody"}]}

    def answer(path, body):
        return chat(body) if path != "/v1/models" else models(body) if models else listed

    async def run():
        async with FakeServer(answer) as server:
            pool = quick_pool(*(urls or [server.url]), retries=1)
            backend = ServerBackend(pool, **{"family": "qwen2_vl", "patience_s": 1.0, **fields})
            try:
                return await do(backend, server)
            finally:
                await backend.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("vllm", [False, True])
def test_a_reply_comes_with_its_tokens_and_the_request_with_its_seed_and_for_vllm_its_choices(vllm):
    facts, reply, body = talk(vllm=vllm, extra={"top_k": 5})
    assert facts == {"model": "m", "videos": "video_url" if vllm else "images", "vllm": vllm}
    assert reply == Reply("hi", False, 3, 2)
    drawn = {"max_tokens": 16, "temperature": 0.5, "top_p": 0.9, "seed": 7, "top_k": 5}
    assert body.items() >= {"model": "m", "messages": HELLO.messages, **drawn}.items()
    assert body.get("structured_outputs") == ({"choice": ["yes", "no"]} if vllm else None)


def test_a_served_model_samples_as_one_in_process_whatever_its_generation_config_says():
    """vLLM takes what a request leaves out from the checkpoint's file; these numbers are a released model's."""
    vllm = pytest.importorskip("vllm")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    file = {"repetition_penalty": 1.05, "top_k": 20, "top_p": 0.8, "temperature": 0.1, "min_p": 0.2}
    got = protocol.ChatCompletionRequest(**talk(vllm=True)[2]).to_sampling_params(16, file)
    here = vllm.SamplingParams(max_tokens=16, temperature=0.5, top_p=0.9, seed=7)
    names = ("repetition_penalty", "top_k", "top_p", "min_p", "temperature", "presence_penalty", "frequency_penalty")
    sampled = [{name: getattr(one, name) for name in names} for one in (got, here)]
    for one in sampled:
        one["top_k"] = max(one["top_k"], 0)  # -1 is 0 by its older name
    assert sampled[0] == sampled[1]
    body = talk(vllm=True, extra={"repetition_penalty": 1.2})[2]
    assert body["repetition_penalty"] == 1.2  # what a person asks for is sent


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_clips_travel_as_vllms_list_of_frames_without_loss(family):
    prompt = PROMPTS.prompt(pairs(3)[2], "target")
    *_, body = talk(do=lambda backend, server: ask(backend, server, prompt), vllm=True, family=family)
    (part, _) = body["messages"][0]["content"]
    frames = part["video_url"]["url"].removeprefix("data:video/jpeg;base64,").split(",")
    sent = [np.asarray(Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in frames]
    assert len(sent) == 4  # an odd clip repeats its last frame
    frames = prompt.messages[0]["content"][0]["video"]
    assert all((mine == np.asarray(frame)).all() for mine, frame in zip(sent, frames, strict=True))
    times = {"fps": 1.0, "frames_indices": [0, 1, 2, 2], "total_num_frames": 4}
    assert body["media_io_kwargs"] == {"video": {**times, "num_frames": -1}}
    asked = {"video_metadata": [times], "do_sample_frames": False} if family == "qwen2_5_vl" else None
    assert body.get("mm_processor_kwargs") == asked


def test_clips_travel_as_images_where_the_server_is_not_vllm():
    messages = encode(PROMPTS.prompt(pairs(3)[2], "target").messages, videos="images")
    assert [part["type"] for part in messages[0]["content"]] == ["image_url"] * 4 + ["text"]


@pytest.mark.parametrize("code", [400, 413])
def test_a_refused_request_is_an_outcome(code):
    _, reply, _ = talk(status(code, error={"message": "the prompt is too long"}))
    assert isinstance(reply, Refused) and reply.cause == f"HTTP {code}" and "too long" in reply.detail


@pytest.mark.parametrize("code", [401, 402, 403, 404])
def test_wrong_settings_stop_the_job(code):
    with pytest.raises(ConfigError, match=f"HTTP {code}.*--url, --model, the key and the account"):
        talk(status(code))


@pytest.mark.parametrize("code", [500, 429])
def test_a_request_that_only_fails_where_others_are_answered_is_an_outcome_of_its_row(code, monkeypatch):
    """Also as the last one, and without patience: another is asked."""
    monkeypatch.setattr("embedrl_verl.annotate.backends._PAUSE_S", 0.001)

    async def impatient(backend, server):
        await backend.connect()
        backend.patience_s = 0.0
        return await backend.complete(backend.prepare(HELLO, SAMPLING)[0])

    def chat(body):
        return status(code)(body) if body["messages"][0]["content"] == "hello" else completion()

    assert talk(chat, impatient).cause == f"HTTP {code}"


def test_servers_that_break_after_many_answers_are_lost_and_no_row_is_refused_for_it():
    left = iter(range(20))
    found = talk(lambda body: status(500)(body) if next(left, None) is None else completion(), ask_many(30))
    assert Counter(map(type, found)) == {Reply: 20, ServersLost: 10}


def test_who_is_told_to_wait_while_others_are_answered_is_answered_in_the_end():
    """Of many that ask at once, two are answered every 50 ms."""
    answered = Counter()

    def chat(body):
        answered[window := time.monotonic() // 0.05] += 1
        return status(429)(body) if answered[window] > 2 else completion()

    assert talk(chat, ask_many(40)) == [Reply("hi", False, 3, 2)] * 40


def test_a_server_that_dies_stops_the_job_after_its_patience():
    start = time.monotonic()
    found = talk(do=ask_many(50, lambda server: server._runner.cleanup()))
    assert {type(one) for one in found} == {ServersLost} and 1.0 <= time.monotonic() - start < 60
    assert "connection refused" in str(found[0]) and "run the command again" in str(found[0])


def test_a_server_that_is_not_there_is_named_at_once_and_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("embedrl_verl.annotate.backends._FIRST_LOOK_S", 0.2)
    url = free_url()
    with pytest.raises(ServersLost, match=f"{url}: .*connection refused.*Is a server running there"):
        talk(urls=[url])
    (said,) = [one.message for one in caplog.records if one.name.endswith("annotate.backends")]
    assert said.startswith(f"{url}: no answer yet") and said.endswith("waiting 1 s in all (--patience)")


def test_a_server_that_is_not_ready_is_none_without_a_list_of_models():
    """Else it would be taken for one that is no vLLM."""
    with pytest.raises(ServersLost, match="HTTP 503.*Is a server running"):
        talk(models=status(503), model="m")


def test_the_model_must_be_one_that_is_served():
    with pytest.raises(ConfigError, match=r"--model must be one that .* serve, \['m'\]; got 'other'"):
        talk(model="other")
    assert talk(model="m")[0]["model"] == "m"


def test_strange_answers_are_outcomes_and_usage_may_lack():
    assert read_reply({"choices": []}).cause == "malformed response" == read_reply(None).cause
    assert read_reply(completion(text=None, usage=None)) == Reply("", False, None, None)
    assert read_reply({**completion(), "usage": "none"}) == Reply("hi")
    assert read_reply(completion(text="a\ud800b", reason="length")) == Reply("a?b", True, 3, 2)


def test_extra_fields_are_none_of_our_own():
    with pytest.raises(ConfigError, match=r"got \['seed'\]"):
        ServerBackend(quick_pool(free_url()), "qwen2_vl", extra={"seed": 1})
