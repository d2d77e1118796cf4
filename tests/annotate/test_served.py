# SPDX-License-Identifier: Apache-2.0
"""Against stock vLLM: killed twice with kill -9 and started again, annotation writes what an unbroken one does; so does
the engine of the process itself. (recipes/build_data_tiny_cpu.sh does the same with the filter.)"""

import json
import os
import subprocess
import time

import pytest

from embedrl_verl.annotate.engine import WORKER
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from tests.annotate.fakes import contents, pairs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ASK = ["--family", "qwen2_vl", "--style", "compact", "--no-few-shot", "--shard-rows", "32", "--evidence", "off"]
ASK += ["--image-min-tokens", "1", "--frame-min-tokens", "1", "--max-tokens", "96", "--max-failed-share", "1"]
ASK += ["--keep-failed"]
# An untrained model writes no T-CoT by itself: vLLM has it write one of a text, which is right for texts alone.
REGEX = r'<thinking>\{"text_keywords":\["(red|find)"\]\}</thinking><rethink>ok</rethink><answer>[0-9]{4}</answer>'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m", family="qwen2_vl")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    port = free_port()
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--enforce-eager", "--port", str(port), "--worker-extension-cls", WORKER]
    log = tmp_path_factory.mktemp("server") / "log"
    server = ServerProcess(command, {**os.environ, **CPU_ENV}, f"http://127.0.0.1:{port}", log, startup_s=1200)
    server.wait_ready()
    yield server.url
    server.stop()


def start(out, *words, count=120):
    """`embedrl data annotate` of so many pairs."""
    file = out.parent / "in.parquet"
    if not file.exists():
        write_pairs(pairs(count), file)
    command = [python(), "-m", "embedrl_verl.cli", "data", "annotate", str(file), "--out", str(out), *ASK, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **CPU_ENV}, **pipes)


def finish(process):
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said[-3000:]
    return said


def test_annotation_killed_twice_equals_an_unbroken_one(url, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    words = ["--url", url, "--tries", "2", "--limit", "16"]
    words += ["--extra-body", json.dumps({"structured_outputs": {"regex": REGEX}})]
    assert "wrote 120 of 120 pairs" in finish(start(unbroken, *words))
    answers = killed / "_work" / "answers.jsonl"
    for count in (60, 200):
        process = start(killed, *words)
        while not answers.exists() or answers.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.02)
        process.kill()
        process.communicate()
    finish(start(killed, *words))
    assert contents(unbroken) == contents(killed)
    card = json.loads((unbroken / "data_card.json").read_text())
    counts = card["annotation"]
    assert counts["sides_with_tcot"] == 40 + 40 + 40 + 40 and counts["sides_failed"] == 80  # texts, and the rest
    assert counts["completion_tokens"] > 10 * counts["replies"] and card["served"]["vllm"]
    found = [pair for part in sorted(unbroken.glob("part-*")) for pair in read_pairs(part)]
    assert len({pair.query.tcot for pair in found}) > 10  # else any order would do


def test_the_engine_of_this_process_gives_the_servers_tcots(url, model, tmp_path):
    """Also of prompts that are read in parts, with seeds: see `SeedsOnCpus`."""
    options = json.dumps({"dtype": "float32", "max_num_batched_tokens": 64, "enforce_eager": True})
    words = ["--tries", "1", "--temperature", "0.01"]
    finish(start(tmp_path / "a", *words, "--url", url, count=24))
    finish(start(tmp_path / "b", *words, "--engine", str(model), "--engine-args", options, count=24))
    failed = [(tmp_path / name / "failed.jsonl").read_text().splitlines() for name in "ab"]
    served, own = ([json.loads(line)["text"] for line in lines] for lines in failed)
    assert len(served) == 48 and len(set(served)) > 10
    assert sum(a == b for a, b in zip(served, own, strict=True)) >= 47
    tokens = [json.loads((tmp_path / name / "data_card.json").read_text())["annotation"] for name in "ab"]
    assert tokens[0]["prompt_tokens"] == tokens[1]["prompt_tokens"] > 0
