# SPDX-License-Identifier: Apache-2.0
"""A server's process is watched, restarted within bounds, and ends with its owner; here the server is a few lines."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from embedrl_verl.embedder.served import guard, process
from embedrl_verl.embedder.served.process import ServerProcess
from embedrl_verl.errors import EmbedderError
from embedrl_verl.serving import PoolSettings, ServerPool
from tests.processes import alive
from tests.serving.fakes import free_url

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


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOOK_S", 0.05)
    monkeypatch.setattr(process, "PROBE_S", 0.3)


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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def test_a_server_that_dies_is_started_again_at_the_same_place(start, url):
    server = start()
    server.wait_ready()
    first = pids(url)
    os.kill(first[0], signal.SIGKILL)
    assert eventually(lambda: not any(map(alive, first))), "what the server had started outlived it"
    assert eventually(lambda: server.restarts == 1 and answers(url))
    assert pids(url)[0] != first[0] and server.failure is None


def test_requests_of_a_server_that_is_killed_are_answered_by_the_one_that_comes_after_it(start, url):
    server = start()
    server.wait_ready()
    first = pids(url)[0]

    async def answered_by() -> list[int]:
        async with ServerPool([url], PoolSettings(limit=4, backoff_s=0.1, probe_interval_s=0.2)) as pool:

            async def ask(number: int) -> int:
                pid = await pool.post("/", {}, deadline=time.monotonic() + 60)
                if number == 0:
                    os.kill(first, signal.SIGKILL)  # 3 others are under way, 8 have not been sent
                return int(pid)

            return await asyncio.gather(*(ask(number) for number in range(12)))

    answers = asyncio.run(answered_by())
    assert server.restarts == 1
    assert set(answers) == {first, pids(url)[0]}


def test_a_server_that_hangs_is_started_again(start, url):
    server = start(hang_s=4.0)
    server.wait_ready()
    first = pids(url)
    os.kill(first[0], signal.SIGSTOP)
    assert eventually(lambda: server.restarts == 1 and answers(url))
    assert not any(map(alive, first))


def test_a_server_that_dies_again_and_again_is_given_up(start, url, monkeypatch):
    monkeypatch.setattr(process, "MAX_RESTARTS", 1)
    server = start()
    for restarts in range(2):
        assert eventually(lambda: server.restarts == restarts and answers(url) and server._ready)  # noqa: B023
        os.kill(pids(url)[0], signal.SIGKILL)
    assert eventually(lambda: server.failure is not None)
    assert "1 restarts" in server.failure and "a line of the log" in server.failure


def test_one_that_never_comes_up_is_reported_with_the_end_of_its_log(start):
    with pytest.raises(EmbedderError, match=r"(?s)ended with status 3.*no such model"):
        start("print('no such model', flush=True); raise SystemExit(3)").wait_ready()
    with pytest.raises(
        EmbedderError, match=r"did not answer within 1 s of its start \(embedrl.embedder.server.startup_s"
    ):
        start("import time; time.sleep(600)", startup_s=1).wait_ready()


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
        for child in children(owner.pid):
            os.kill(child, signal.SIGKILL)
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


def test_another_program_on_the_port_ends_the_wait_and_not_the_watcher(start):
    """It speaks no HTTP: the server is given up in time, with its cause."""
    garbage = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        with listener.accept()[0] as one:
            one.recv(1000), one.sendall(b"garbage\\r\\n\\r\\n")
"""
    server = start(garbage, startup_s=2)
    assert eventually(lambda: server.failure is not None, within_s=30), "the watcher is gone"
    with pytest.raises(EmbedderError, match="did not answer within 2 s"):
        server.wait_ready()
