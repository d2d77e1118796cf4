# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process: who is refused, and what ends the job. (A real engine: test_served.py.)"""

import asyncio
import pkgutil
import sys
from types import ModuleType, SimpleNamespace

import pytest

from embedrl_verl.annotate.backends import Refused, ServersLost
from embedrl_verl.annotate.engine import EngineBackend
from embedrl_verl.annotate.prompts import Prompt, Sampling
from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms import vllm_seeds


class FakeLLM:
    """Says every prompt backwards; refuses batches with "long", and dies of "die"."""

    def __init__(self, model, **options):
        if model == "nowhere":
            raise AssertionError("no such\nfolder")
        self.options, self.batches = options, []

    def get_tokenizer(self):
        return SimpleNamespace(apply_chat_template=lambda messages, **options: messages[0]["content"])

    def generate(self, prompts, params, use_tqdm):
        texts = [prompt["prompt"] for prompt in prompts]
        self.batches.append(len(texts))
        if "long" in texts:
            raise ValueError("the prompt is too long")
        if "die" in texts:
            raise RuntimeError("engine is dead")
        made = [SimpleNamespace(text=text[::-1], finish_reason="stop", token_ids=[1]) for text in texts]
        return [SimpleNamespace(outputs=[one], prompt_token_ids=[1, 2]) for one in made]


@pytest.fixture
def ask(monkeypatch):
    """Replies to texts, and the engine."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.platforms")}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = FakeLLM, SimpleNamespace
    modules["vllm.sampling_params"].StructuredOutputsParams = SimpleNamespace
    modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    async def run(texts, path, options):
        backend = EngineBackend(path, "qwen2_5_vl", options)
        try:
            await backend.connect()
            requests = [backend.prepare(Prompt([{"role": "user", "content": one}]), Sampling(8))[0] for one in texts]
            return await asyncio.gather(*map(backend.complete, requests)), backend._engine
        finally:
            await backend.aclose()

    return lambda texts, path="m", **options: asyncio.run(run(texts, path, options))


def test_waiting_requests_go_together_and_one_that_is_refused_costs_no_other(ask):
    replies, engine = ask([*"abcd", "long", *"efgh"])
    assert replies.pop(4) == Refused("refused by the engine", "the prompt is too long")
    assert [reply.text for reply in replies] == [*"abcdefgh"]
    assert engine.batches[0] == 9 and len(engine.batches) <= 1 + 2 * 4  # halved, not one by one


def test_an_engine_that_dies_or_does_not_start_says_why_in_one_line(ask):
    with pytest.raises(ServersLost, match="the engine has failed .*engine is dead.*run the command again"):
        ask(["a", "die", "b"])
    with pytest.raises(ConfigError, match=r"load --engine nowhere .*AssertionError: no such folder$"):
        ask(["a"], path="nowhere")


def test_an_engine_fits_the_memory_and_heeds_seeds_on_a_cpu_unless_told_otherwise(ask, monkeypatch):
    _, engine = ask(["a"])
    assert engine.options["max_model_len"] == -1  # vLLM's word for what fits
    patched = []
    monkeypatch.setattr(vllm_seeds, "rewind_cpu_generators", lambda: patched.append("cpu"))
    pkgutil.resolve_name(engine.options["worker_extension_cls"])(rank=0)
    sys.modules["vllm.platforms"].current_platform.is_cpu = lambda: False
    pkgutil.resolve_name(engine.options["worker_extension_cls"])(rank=0)
    assert patched == ["cpu"]
    assert ask(["a"], max_model_len=512)[1].options["max_model_len"] == 512
