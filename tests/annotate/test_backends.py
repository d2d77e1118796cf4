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

from embedrl_verl.annotate.backends import Refused, Reply, Sampling, ServerBackend, ServersLost, encode, read_reply
from embedrl_verl.annotate.prompts import Prompt
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


def served(chat, vllm=False):
    """An answer function: one model, and `chat(body)`."""

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "m", "owned_by": "vllm" if vllm else "somebody"}]}
        return chat(body)

    return answer


def talk(answer, do, urls=(), patience_s=5.0, **fields):
    """Run `do(backend, server)` against a server."""

    async def run():
        async with FakeServer(answer) as server:
            pool = quick_pool(*(urls or [server.url]), retries=1)
            backend = ServerBackend(pool, **{"family": "qwen2_vl", "patience_s": patience_s, **fields})
            try:
                return await do(backend, server)
            finally:
                await backend.aclose()

    return asyncio.run(run())


async def ask(backend, server, prompt=HELLO):
    facts = await backend.connect()
    request, _ = backend.prepare(prompt, SAMPLING)
    return facts, await backend.complete(request), [body for body in server.bodies if body]


@pytest.mark.parametrize("vllm", [False, True])
def test_a_reply_comes_with_its_tokens_and_the_request_with_its_seed_and_for_vllm_its_choices(vllm):
    facts, reply, (body,) = talk(served(lambda body: completion(), vllm), ask, extra={"top_k": 5})
    videos = "video_url" if vllm else "images"
    assert facts == {"model": "m", "videos": videos, "vllm": vllm, "extra": {"top_k": 5}}
    assert reply == Reply("hi", False, 3, 2)
    drawn = {"max_tokens": 16, "temperature": 0.5, "top_p": 0.9, "seed": 7, "top_k": 5}
    assert body.items() >= {"model": "m", "messages": HELLO.messages, **drawn}.items()
    assert body.get("structured_outputs") == ({"choice": ["yes", "no"]} if vllm else None)


def test_a_served_model_samples_as_one_in_process_whatever_its_generation_config_says():
    """vLLM takes what a request leaves out from the checkpoint's file; these numbers are a released model's."""
    vllm = pytest.importorskip("vllm")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    _, _, (body,) = talk(served(lambda body: completion(), vllm=True), ask)
    file = {"repetition_penalty": 1.05, "top_k": 20, "top_p": 0.8, "temperature": 0.1, "min_p": 0.2}
    got = protocol.ChatCompletionRequest(**body).to_sampling_params(16, file)
    here = vllm.SamplingParams(max_tokens=16, temperature=0.5, top_p=0.9, seed=7)
    names = ("repetition_penalty", "top_k", "top_p", "min_p", "temperature", "presence_penalty", "frequency_penalty")
    sampled = [{name: getattr(one, name) for name in names} for one in (got, here)]
    for one in sampled:
        one["top_k"] = max(one["top_k"], 0)  # -1 is 0 by its older name
    assert sampled[0] == sampled[1]
    _, _, (body,) = talk(served(lambda body: completion(), vllm=True), ask, extra={"repetition_penalty": 1.2})
    assert body["repetition_penalty"] == 1.2  # what a person asks for is sent


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_clips_travel_as_vllms_list_of_frames_without_loss(family):
    prompt = PROMPTS.prompt(pairs(3)[2], "target")
    chat = served(lambda body: completion(), vllm=True)
    *_, (body,) = talk(chat, lambda backend, server: ask(backend, server, prompt), family=family)
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


@pytest.mark.parametrize("status", [400, 413])
def test_a_refused_request_is_an_outcome(status):
    body = {"error": {"message": "the prompt is too long"}}
    _, reply, _ = talk(served(lambda _: web.json_response(body, status=status)), ask)
    assert isinstance(reply, Refused) and reply.cause == f"HTTP {status}" and "too long" in reply.detail


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_wrong_settings_stop_the_job(status):
    with pytest.raises(ConfigError, match=f"HTTP {status}.*--url, --model, the key and the account"):
        talk(served(lambda _: web.Response(status=status)), ask)


def test_a_request_that_breaks_servers_that_are_well_is_an_outcome_of_its_row_also_as_the_last_one():
    def chat(body):
        return web.Response(status=500) if body["messages"][0]["content"] == "hello" else completion()

    assert talk(served(chat), ask)[1].cause == "HTTP 500"


def test_servers_that_break_after_many_answers_are_lost_and_no_row_is_refused_for_it():
    left = iter(range(20))

    async def many(backend, server):
        await backend.connect()
        request, _ = backend.prepare(HELLO, SAMPLING)
        return await asyncio.gather(*(backend.complete(request) for _ in range(30)), return_exceptions=True)

    found = talk(served(lambda _: web.Response(status=500) if next(left, None) is None else completion()), many)
    assert [type(one) for one in found].count(Reply) == 20 and [type(one) for one in found].count(ServersLost) == 10


def test_who_is_told_to_wait_while_others_are_answered_is_answered_in_the_end():
    """Of many that ask at once, two are answered every 50 ms."""
    answered = Counter()

    def chat(body):
        answered[window := time.monotonic() // 0.05] += 1
        return web.Response(status=429) if answered[window] > 2 else completion()

    async def many(backend, server):
        await backend.connect()
        request, _ = backend.prepare(HELLO, SAMPLING)
        return await asyncio.gather(*(backend.complete(request) for _ in range(40)))

    assert talk(served(chat), many) == [Reply("hi", False, 3, 2)] * 40


def test_a_server_that_dies_stops_the_job_after_its_patience():
    async def lose(backend, server):
        await backend.connect()
        request, _ = backend.prepare(HELLO, SAMPLING)
        await backend.complete(request)
        await server._runner.cleanup()
        start = asyncio.get_running_loop().time()
        with pytest.raises(ServersLost, match="no server was up for 2 s .*connection refused.*run the command again"):
            await asyncio.gather(*(backend.complete(request) for _ in range(50)))
        return asyncio.get_running_loop().time() - start

    assert 1.9 < talk(served(lambda _: completion()), lose, patience_s=2.0) < 60


def test_a_server_that_is_not_ready_is_waited_for_and_is_none_without_a_list_of_models():
    """Else it would be taken for one that is no vLLM."""
    with pytest.raises(ServersLost, match="HTTP 503.*Is a server running"):
        talk(lambda path, body: web.Response(status=503), ask, model="m")


def test_the_model_must_be_one_that_is_served():
    with pytest.raises(ConfigError, match=r"--model must be one that .* serve, \['m'\]; got 'other'"):
        talk(served(lambda _: completion()), ask, model="other")
    assert talk(served(lambda _: completion()), ask, model="m")[0]["model"] == "m"


def test_strange_answers_are_outcomes_and_usage_may_lack():
    assert read_reply({"choices": []}).cause == "malformed response" == read_reply(None).cause
    assert read_reply(completion(text=None, usage=None)) == Reply("", False, None, None)
    assert read_reply({**completion(), "usage": "none"}) == Reply("hi")
    assert read_reply(completion(text="a\ud800b", reason="length")).text == "a?b"
    assert read_reply(completion(reason="length")).cut_off


@pytest.mark.parametrize(
    ("fields", "message"), [({"extra": {"seed": 1}}, "got \\['seed'\\]"), ({"videos": "x"}, "'x'")]
)
def test_fields_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ServerBackend(quick_pool(free_url()), "qwen2_vl", **fields)
