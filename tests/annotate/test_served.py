# SPDX-License-Identifier: Apache-2.0
"""Against stock vLLM: killed twice with kill -9 and started again, annotation writes what an unbroken one does; so does
the engine of the process itself. (recipes/build_data_tiny_cpu.sh does the same with the filter.)"""

import json
import os
import signal
import subprocess
import time

import pytest

from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from tests.annotate.fakes import contents, pairs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COUNT = 120
# An untrained model writes no T-CoT by itself: vLLM has it write one of a text, which is right for texts alone.
REGEX = r'<thinking>\{"text_keywords":\["(red|find)"\]\}</thinking><rethink>ok</rethink><answer>[0-9]{4}</answer>'
ASK = ["--family", "qwen2_vl", "--style", "compact", "--no-few-shot", "--shard-rows", "32", "--tries", "2"]
ASK += ["--image-min-tokens", "1", "--frame-min-tokens", "1", "--max-tokens", "96", "--max-failed-share", "1"]
ASK += ["--keep-failed", "--evidence", "off"]
SERVED = ["--extra-body", json.dumps({"structured_outputs": {"regex": REGEX}}), "--limit", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m", family="qwen2_vl")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    port = free_port()
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--served-model-name", "tiny", "--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    server = ServerProcess(command, {**os.environ, **CPU_ENV}, f"http://127.0.0.1:{port}", log, startup_s=1200)
    server.wait_ready()
    yield server.url
    server.stop()


@pytest.fixture
def file(tmp_path):
    write_pairs(pairs(COUNT), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def start(*words):
    command = [python(), "-m", "embedrl_verl.cli", "data", *map(str, words)]
    return subprocess.Popen(
        command, env={**os.environ, **CPU_ENV}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, code=0):
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == code, said[-3000:]
    return said


def kill_at(answers, file, *words):
    """Start a command and kill it with signal 9 when so many answers are on the disk."""
    process = start(*words)
    while not file.exists() or file.read_bytes().count(b"\n") < answers:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_annotation_killed_twice_equals_an_unbroken_one(url, file, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    said = finish(start("annotate", file, "--out", unbroken, "--url", url, *ASK, *SERVED))
    assert f"wrote {COUNT} of {COUNT} pairs" in said
    for answers in (60, 200):
        kill_at(
            answers, killed / "_work" / "answers.jsonl", "annotate", file, "--out", killed, "--url", url, *ASK, *SERVED
        )
    finish(start("annotate", file, "--out", killed, "--url", url, *ASK, *SERVED))
    assert contents(unbroken) == contents(killed)
    card = json.loads((unbroken / "data_card.json").read_text())
    counts = card["annotation"]
    assert counts["sides_with_tcot"] == 40 + 40 + 40 + 40 and counts["sides_failed"] == 80  # texts, and the rest
    assert counts["completion_tokens"] > 10 * counts["replies"] and card["served"]["vllm"]
    found = [pair for part in sorted(unbroken.glob("part-*")) for pair in read_pairs(part)]
    assert len({pair.query.tcot for pair in found}) > 10  # else any order would do


def test_the_engine_of_this_process_gives_the_servers_tcots(url, model, file, tmp_path):
    write_pairs(pairs(24), file)
    ask = [*ASK, "--tries", "1"]
    finish(start("annotate", file, "--out", tmp_path / "a", "--url", url, *ask))
    options = json.dumps({"dtype": "float32", "max_model_len": 512, "enforce_eager": True})
    finish(start("annotate", file, "--out", tmp_path / "b", "--engine", model, "--engine-args", options, *ask))
    served, own = ((tmp_path / name / "failed.jsonl").read_text().splitlines() for name in "ab")
    texts = [[json.loads(line)["text"] for line in lines] for lines in (served, own)]
    assert len(texts[0]) == 48 and len(set(texts[0])) > 10
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 47
    tokens = [json.loads((tmp_path / name / "data_card.json").read_text())["annotation"] for name in "ab"]
    assert tokens[0]["prompt_tokens"] == tokens[1]["prompt_tokens"] > 0
