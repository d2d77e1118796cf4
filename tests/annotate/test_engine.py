# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process: who is refused, and what ends the job. (A real engine: test_served.py.)"""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from embedrl_verl.annotate.backends import Refused, Reply, Sampling, ServersLost
from embedrl_verl.annotate.engine import EngineBackend
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.errors import ConfigError


class FakeLLM:
    """Says every prompt backwards; refuses batches with "long", and dies of "die"."""

    batches: list[int]

    def __init__(self, model, **options):
        if model == "nowhere":
            raise OSError("no such folder")
        self.batches = []

    def get_tokenizer(self):
        template = lambda messages, **options: messages[0]["content"]  # noqa: E731
        return SimpleNamespace(apply_chat_template=template)

    def generate(self, prompts, params, use_tqdm):
        self.batches.append(len(prompts))
        texts = [prompt["prompt"] for prompt in prompts]
        if "long" in texts:
            raise ValueError("the prompt is too long")
        if "die" in texts:
            raise RuntimeError("engine is dead")
        made = [SimpleNamespace(text=text[::-1], finish_reason="stop", token_ids=[1]) for text in texts]
        return [SimpleNamespace(outputs=[one], prompt_token_ids=[1, 2]) for one in made]


@pytest.fixture
def ask(monkeypatch):
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace
    params.StructuredOutputsParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)

    async def run(texts, path="m"):
        backend = EngineBackend(path, "qwen2_5_vl")
        try:
            facts = await backend.connect()
            prompts = [Prompt([{"role": "user", "content": text}]) for text in texts]
            requests = [backend.prepare(prompt, Sampling(8))[0] for prompt in prompts]
            replies = await asyncio.gather(*map(backend.complete, requests))
            return facts, replies, backend._engine.batches
        finally:
            await backend.aclose()

    return lambda texts, path="m": asyncio.run(run(texts, path))


def test_waiting_requests_go_together_and_one_that_is_refused_costs_no_other(ask):
    texts = [*"abcd", "long", *"efgh"]
    _, replies, batches = ask(texts)
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == [*"abcdefgh"]
    assert replies[4] == Refused("refused by the engine", "the prompt is too long")
    assert batches[0] == 9 and len(batches) <= 1 + 2 * 4  # halved, not one by one


def test_an_engine_that_dies_or_does_not_start_says_what_to_do(ask):
    with pytest.raises(ServersLost, match="the engine has failed .*engine is dead.*run the command again"):
        ask(["a", "die", "b"])
    with pytest.raises(ConfigError, match="load --engine nowhere .*no such folder"):
        ask(["a"], path="nowhere")
