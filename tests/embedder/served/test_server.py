# SPDX-License-Identifier: Apache-2.0
"""A stock vLLM pooling server gives the vectors of an exported Embedder, also after it hung, or one of two was lost.

Real processes; what fails is an error, never a vector. tests/e2e/test_embedding_backends.py kills one in a run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.served.client import ServedEmbedder, check_servers
from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.errors import EmbedderError
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, item, mixed_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROWS = 24  # twice every combination of medium, T-CoT and evidence
# Says when it listens, takes four connections (as many rows), answers none, and is killed.
SILENT = """
import os, signal, socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listens", flush=True)
taken = [server.accept() for _ in range(4)]
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "embedder").mkdir()
    (folder / "embedder" / "huggingface").symlink_to(checkpoint())
    return export_checkpoint(folder / "embedder", folder / "out", kind="embedder").folder


@pytest.fixture(scope="module")
def config(exported) -> EmbedderConfig:
    limits = {name: value for name, value in dataclasses.asdict(LIMITS["qwen2_vl"]).items() if name.endswith("_tokens")}
    return EmbedderConfig(
        path=str(exported),
        dtype="float32",
        backend="server",
        server=EmbedderServerConfig(max_model_len=1024, limit=8),
        **limits,
    )


@pytest.fixture(scope="module")
def server(config, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    processor, template = processor_for(config), folder / "template.jinja"
    template.write_text(prompt_template(processor))
    arguments = server_arguments(config, processor, on_cpu=True, plain_input=True)
    command = server_command(arguments, template, host="127.0.0.1", port=port, python=python())
    process = ServerProcess(
        command, {**os.environ, **CPU_ENV}, f"http://127.0.0.1:{port}", folder / "log", startup_s=400
    )
    process.wait_ready()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def expected(embedder) -> torch.Tensor:
    return embedder().embed(mixed_inputs(ROWS))


def embed(config: EmbedderConfig, inputs: Sequence[EmbedInput], urls: Sequence[str], **settings: Any) -> Any:
    """(results, the pool's servers): a vector or an EmbedderError of each row, all sent at once."""
    section = dataclasses.replace(config.server, urls=tuple(urls), **settings)
    served = ServedEmbedder(dataclasses.replace(config, server=section), processor_for(config))

    async def run() -> list[Any]:
        async with served.pool:
            requests = [served.prepare(one) for one in inputs]
            return await asyncio.gather(*map(served.embed, requests), return_exceptions=True)

    results = asyncio.run(run())
    assert all(isinstance(one, (torch.Tensor, EmbedderError)) for one in results), results
    return results, served.pool.servers


def worst(results: Sequence[Any], expected: torch.Tensor) -> float:
    errors = [str(one) for one in results if isinstance(one, Exception)]
    assert not errors, errors
    return float((torch.stack(list(results)) * expected).sum(dim=1).min())


def server_pid(url: str) -> int:
    """The API server: who listens there."""
    port = int(url.rpartition(":")[2])
    listening = [one for one in psutil.net_connections("tcp") if one.laddr.port == port and one.status == "LISTEN"]
    return next(one.pid for one in listening if one.pid is not None)


def test_a_server_that_fits_is_accepted_and_its_vectors_are_the_embedders(config, server, expected):
    check_servers(config, processor_for(config), [server.url])
    results, _ = embed(config, mixed_inputs(ROWS), [server.url])
    assert worst(results, expected) >= 0.999
    assert float((expected[:-1] * expected[1:]).sum(dim=1).min()) < 0.99  # else anything would pass


def test_a_bare_text_has_the_embedders_vector_or_is_refused(server, embedder):
    texts = ["a heron on one leg", "the reply ends with <|eot_id|> and <emb>", "字" * 40 + "."]
    wanted = embedder().embed([EmbedInput(item(text)) for text in texts])

    def ask(given: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/embeddings", json={"input": given}, timeout=120, trust_env=False)

    for answer in ([ask(text).json()["data"][0] for text in texts], ask(texts).json()["data"]):
        found = torch.tensor([one["embedding"] for one in answer])
        assert float((found * wanted).sum(dim=1).min()) >= 0.999
    refused = ask([1, 2, 3])
    assert refused.status_code == 400 and "input must be a text or a list of texts" in refused.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"image_max_tokens": 300},
            "large images probe.*--mm-processor-kwargs.*embedrl serve-embedder.*--image-tokens 1 300",
        ),
        ({"profile": "vlm2vec_v2"}, "text probe.*chat template.*--profile vlm2vec_v2"),
        (
            {"server": EmbedderServerConfig(max_model_len=2048)},
            "--max-model-len.* is 1024 tokens, and rows may have 2048.*embedrl serve-embedder.*--max-model-len 2048",
        ),
    ],
)
def test_a_server_started_otherwise_is_refused(change, reason, config, server):
    other = dataclasses.replace(config, **change)
    with pytest.raises(EmbedderError, match=rf"(?s){server.url}: .*{reason}"):
        check_servers(other, processor_for(other), [server.url])


def test_a_server_of_another_model_is_refused(config, server, tmp_path):
    wider = dataclasses.replace(config, path=str(build_tiny_model(tmp_path / "wider", hidden_size=192)))
    with pytest.raises(EmbedderError, match="vectors have 128 numbers; the Embedder's have 192"):
        check_servers(wider, processor_for(wider), [server.url])


def test_nobody_at_the_address_is_said_before_the_run(config):
    section = dataclasses.replace(config.server, retries=0)
    with pytest.raises(EmbedderError, match="connection refused.*embedrl serve-embedder"):
        check_servers(dataclasses.replace(config, server=section), processor_for(config), [f"127.0.0.1:{free_port()}"])


def test_rows_of_a_server_that_is_lost_move_to_the_other(config, server, expected):
    port = free_port()
    silent = subprocess.Popen([sys.executable, "-c", SILENT, str(port)], stdout=subprocess.PIPE)
    assert silent.stdout is not None
    with silent.stdout as said:
        assert said.readline() == b"listens\n"
    try:
        results, (lost, good) = embed(
            config, mixed_inputs(ROWS), [f"http://127.0.0.1:{port}", server.url], deadline_s=120
        )
    finally:
        silent.kill()
        silent.wait()
    assert worst(results, expected) >= 0.999
    assert lost.requests >= 4 and not lost.up and lost.last_error in ("connection lost", "connection refused")
    assert good.requests == ROWS


def test_a_hanging_server_fails_rows_in_time_and_is_used_again(config, server, expected):
    stopped = server_pid(server.url)
    inputs = mixed_inputs(ROWS)
    os.kill(stopped, signal.SIGSTOP)
    try:
        start = time.monotonic()
        results, _ = embed(config, inputs[:8], [server.url], timeout_s=2, retries=1, deadline_s=5)
        assert time.monotonic() - start < 30
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert {str(one) for one in results} <= {
        f"embedding server: {why}" for why in ("timeout", "deadline", "no server is up")
    }
    results, _ = embed(config, inputs, [server.url])
    assert worst(results, expected) >= 0.999
