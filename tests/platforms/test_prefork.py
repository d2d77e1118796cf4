# SPDX-License-Identifier: Apache-2.0
"""A process forked by the prefork server is what a new interpreter would be, without the imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import prefork
from embedrl_verl.platforms.prefork import FIRST_RAY_JOB, prefork_server

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="descriptors are listed in /proc")


@pytest.fixture(scope="module")
def server():
    with prefork_server(["numpy", "ray"]) as env:
        yield env


def start(server, *arguments: str, **kwargs) -> subprocess.Popen:
    env = {**os.environ, **server, **kwargs.pop("env", {})}
    return subprocess.Popen(
        [server["EMBEDRL_PREFORK_PYTHON"], *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_arguments_environment_folder_and_exit_code_are_the_callers(server, tmp_path):
    code = "import os, sys; print(sys.argv, os.environ['X'], os.getcwd(), 'numpy' in sys.modules); sys.exit(7)"
    process = start(server, "-c", code, "a", "b c", env={"X": "ä\n"}, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert out == f"['-c', 'a', 'b c'] ä\n {tmp_path} True\n", err
    assert process.returncode == 7


def test_a_script_runs_as_main_with_its_folder_on_the_path(server, tmp_path):
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    (tmp_path / "script.py").write_text("import helper, sys\nprint(__name__, __file__ == sys.argv[0], helper.VALUE)\n")
    out, err = start(server, "-u", str(tmp_path / "script.py")).communicate(timeout=60)
    assert out == "__main__ True 5\n", err


def test_an_exception_is_printed_and_ends_with_1(server):
    process = start(server, "-c", "raise ValueError('oh')")
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "ValueError: oh" in err


def test_exit_functions_run_and_output_is_complete(server):
    code = "import atexit; atexit.register(print, 'bye'); print('x' * 100000)"
    out, _err = start(server, "-c", code).communicate(timeout=60)
    assert out == "x" * 100000 + "\nbye\n"


def test_open_files_arrive_under_their_numbers(server, tmp_path):
    with (tmp_path / "file").open("w") as file:
        code = f"import os; os.write({file.fileno()}, b'hello'); print(len(os.listdir('/proc/self/fd')))"
        out, err = start(server, "-c", code, pass_fds=(file.fileno(),)).communicate(timeout=60)
    assert (tmp_path / "file").read_text() == "hello", err
    assert int(out) == 5, "0, 1, 2, the file, and the listing: nothing of the server's"


def test_multiprocessing_spawn_forks_from_the_server_too(server, tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing, sys\n"
        "def work(queue): queue.put(('numpy' in sys.modules, multiprocessing.current_process().name))\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=work, args=(queue,), name='p')\n"
        "    process.start()\n"
        "    print(queue.get(timeout=30))\n"
        "    process.join()\n"
        "    print(process.exitcode)\n"
    )
    out, err = start(server, str(tmp_path / "script.py")).communicate(timeout=60)
    assert out == "(True, 'p')\n0\n", err


def test_processes_have_groups_of_their_own_and_children_join_their_parents(server):
    """Ray ends a worker by a signal to its group."""
    code = (
        "import os, subprocess, sys\n"
        "print(os.getpgrp() == os.getpid(), flush=True)\n"
        "child = [os.environ['EMBEDRL_PREFORK_PYTHON'], '-c', f'import os; print(os.getpgrp() == {os.getpgrp()})']\n"
        "subprocess.run(child, check=True)"
    )
    out, err = start(server, "-c", code).communicate(timeout=60)
    assert out == "True\nTrue\n", err


def test_processes_draw_different_random_numbers(server):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = [start(server, "-c", code).communicate(timeout=60)[0].split() for _ in range(2)]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_client_ends_the_forked_process(kill, server):
    process = start(server, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    pid = int(process.stdout.readline())
    process.send_signal(kill)
    process.communicate(timeout=10)
    assert wait_until_gone(pid)
    assert process.returncode == (143 if kill == signal.SIGTERM else -9)


def test_the_end_of_the_server_ends_its_processes():
    with prefork_server(["numpy", "ray"]) as server:
        process = start(server, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        pid = int(process.stdout.readline())
    assert wait_until_gone(pid)
    process.communicate(timeout=10)
    assert not Path(server["EMBEDRL_PREFORK_PYTHON"]).exists()


def test_a_job_of_another_cluster_is_refused(server):
    process = start(server, "-c", "print('ran')", env={"RAY_JOB_ID": "02000000"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert f"whose job is {FIRST_RAY_JOB}; got 02000000" in err


def test_a_process_with_threads_is_not_forked(tmp_path, monkeypatch):
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ResourceError, match="must have one thread"):
        prefork.preload(["starts_a_thread"])


def test_a_server_that_failed_costs_time_and_says_so(server, tmp_path):
    gone = {"EMBEDRL_PREFORK_SOCKET": str(tmp_path / "gone")}
    out, err = start(server, "-c", "print('plain')", env=gone).communicate(timeout=60)
    assert out == "plain\n" and "the prefork server has ended" in err


def test_a_running_server_is_shared(server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    with prefork_server(["numpy"]) as shared:
        assert shared == server


def test_without_a_server_the_interpreter_itself_runs():
    client = [sys.executable, "-I", "-S", prefork.prefork_client.__file__]
    env = {key: value for key, value in os.environ.items() if key != "EMBEDRL_PREFORK_SOCKET"}
    out = subprocess.run([*client, "-c", "print('plain')"], env=env, capture_output=True, text=True, check=True).stdout
    assert out == "plain\n"
