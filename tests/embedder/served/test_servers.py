# SPDX-License-Identifier: Apache-2.0
"""A server is watched, started again within bounds, and ends with its owner; here it is a few lines. What is said of
servers never ends a run."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from embedrl_verl.embedder.served import guard, servers
from embedrl_verl.embedder.served.servers import ServerFleet, ServerProcess
from embedrl_verl.errors import EmbedderError
from tests.processes import alive
from tests.serving.fakes import free_url, quick_pool

# Answers every GET with its own process id and that of a child that would outlive it; a POST, after a while, with the
# first as JSON. Their length is said: an answer that is cut off is none.
SERVER = """
import http.server, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, text):
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.answer(f"{os.getpid()} {child.pid}")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"])); time.sleep(0.2)
        self.answer(str(os.getpid()))
    def log_message(self, *args): pass
print("a line of the log", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# Owns a server as ServerProcess does, in a process that the test may kill.
OWNER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE)
time.sleep(600)
"""
# Speaks no HTTP.
GARBAGE = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        with listener.accept()[0] as one:
            one.recv(1000), one.sendall(b"garbage\\r\\n\\r\\n")
"""


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "LOOK_S", 0.05)
    monkeypatch.setattr(servers, "PROBE_S", 0.3)


@pytest.fixture
def url() -> str:
    return free_url()


@pytest.fixture
def start(url, tmp_path):
    started: list[ServerProcess] = []

    def make(code: str = SERVER, **options: float) -> ServerProcess:
        command = [sys.executable, "-c", code, url.rsplit(":", 1)[1]]
        server = ServerProcess(command, dict(os.environ), url, tmp_path / "server.log", **{"startup_s": 20, **options})
        started.append(server)
        return server

    yield make
    for server in started:
        server.stop()


def pids(url: str) -> list[int]:
    with urllib.request.urlopen(url, timeout=5) as response:
        return [int(pid) for pid in response.read().split()]


def answers(url: str) -> bool:
    try:
        return bool(pids(url))
    except (OSError, http.client.HTTPException):
        return False


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def test_a_server_that_dies_is_started_again_and_answers_the_requests_of_the_one_before(start, url):
    server = start()
    server.wait_ready()
    first = pids(url)

    async def answered_by() -> list[int]:
        async with quick_pool(url, limit=4, backoff_s=0.1, probe_interval_s=0.2) as pool:

            async def ask(number: int) -> int:
                pid = await pool.post("/", {}, deadline=time.monotonic() + 60)
                if number == 0:
                    os.kill(first[0], signal.SIGKILL)  # 3 others are under way, 8 have not been sent
                return int(pid)

            return await asyncio.gather(*(ask(number) for number in range(12)))

    answered = asyncio.run(answered_by())
    assert eventually(lambda: not any(map(alive, first))), "what the server had started outlived it"
    assert server.restarts == 1 and server.failure is None
    assert set(answered) == {first[0], pids(url)[0]} and pids(url)[0] != first[0]


def test_a_server_that_hangs_is_started_again(start, url):
    server = start(hang_s=4.0)
    server.wait_ready()
    first = pids(url)
    os.kill(first[0], signal.SIGSTOP)
    assert eventually(lambda: server.restarts == 1 and answers(url))
    assert not any(map(alive, first))


def test_a_server_that_dies_again_and_again_is_given_up(start, url, monkeypatch):
    monkeypatch.setattr(servers, "MAX_RESTARTS", 1)
    server = start()
    for restarts in range(2):
        server.wait_ready()
        assert eventually(lambda: server.restarts == restarts and answers(url))  # noqa: B023
        os.kill(pids(url)[0], signal.SIGKILL)
    assert eventually(lambda: server.failure is not None)
    assert "1 restarts" in server.failure and "a line of the log" in server.failure


@pytest.mark.parametrize(
    ("code", "startup_s", "said"),
    [
        ("print('no such model', flush=True); raise SystemExit(3)", 20, r"(?s)ended with status 3.*no such model"),
        ("import time; time.sleep(600)", 1, r"did not answer within 1 s of its start \(embedrl.*server.startup_s"),
        (GARBAGE, 2, "did not answer within 2 s"),
    ],
)
def test_one_that_never_comes_up_is_reported_with_the_end_of_its_log_and_not_tried_again(code, startup_s, said, start):
    server = start(code, startup_s=startup_s)
    with pytest.raises(EmbedderError, match=said):
        server.wait_ready()
    assert server.restarts == 0


def test_stopping_ends_what_the_server_has_started(start, url):
    server = start()
    server.wait_ready()
    started = pids(url)
    server.stop()
    assert not any(map(alive, started)) and server.restarts == 0


@pytest.mark.parametrize("with_its_children", [False, True])
def test_a_server_does_not_outlive_an_owner_that_is_killed(url, with_its_children):
    port = url.rsplit(":", 1)[1]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, guard.__file__, sys.executable, "-c", SERVER, port])
    assert eventually(lambda: answers(url))
    started = pids(url)
    assert all(map(alive, started))
    if with_its_children:  # as Ray does
        children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert eventually(lambda: not any(map(alive, started)))


def test_what_does_not_heed_sigterm_is_killed():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    guard._end_group(child.pid, 0.3)
    assert child.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.ActorDiedError(), "is lost \\(ActorDiedError\\)"),
        (ray.exceptions.GetTimeoutError(), "says nothing within"),
    ],
)
def test_the_loss_of_one_servers_process_is_told_and_is_no_error(monkeypatch, error, said):
    def get(answer, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(servers.ray, "get", get)
    states = [(2, None), error]
    fleet = ServerFleet.__new__(ServerFleet)
    fleet._restarts = [0, 0]
    fleet._actors = [SimpleNamespace(state=SimpleNamespace(remote=lambda i=i: states[i])) for i in (0, 1)]
    first, (restarts, failure) = fleet.states()
    assert first == (2, None) and restarts == 0
    assert re.search(said, failure)
