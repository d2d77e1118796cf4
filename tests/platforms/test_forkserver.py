# SPDX-License-Identifier: Apache-2.0
"""A forked process is what a new interpreter would be, but for the imports; what cannot be forked, one runs."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from embedrl_verl.platforms import forkserver
from embedrl_verl.platforms.forkserver import PYTHON, ForkServer, fork_ray_workers, fork_server, python
from embedrl_verl.platforms.ports import ports_given_to_nobody

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import atexit, json, os, random, signal, sys
import helper
import numpy
atexit.register(print, "bye")
print(json.dumps({
    "name": __name__, "arguments": sys.argv[1:], "given": os.environ.get("GIVEN"), "folder": os.getcwd(),
    "has": sorted({"json.tool", "numpy"} & set(sys.modules)), "helper": helper.VALUE, "input": sys.stdin.read(),
    "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])], "leads": os.getsid(0) == os.getpid(),
    "drawn": [random.random(), float(numpy.random.rand())], "file": os.read(int(sys.argv[2]), 9).decode(),
}))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server():
    """One that has imported little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(PYTHON, raising=False)
        server = ForkServer(os.environ, ["json.tool", "numpy"])
        yield server
        server.close()


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    return str(tmp_path / "script.py")


RAYS_IDS = "import ray._raylet as ray; print(ray.TaskID.for_fake_task(ray.JobID.from_int(1)).hex())"


def run(server: ForkServer, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([server.python, *arguments], text=True, capture_output=True, timeout=100, **options)


def ends(process: int) -> bool:
    """Whether the process of this descriptor ends."""
    return bool(select.select([process], [], [], 100)[0])


def test_what_a_process_leaves_in_its_group_ends_with_it(server):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    client = subprocess.Popen([server.python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    left = os.pidfd_open(int(client.stdout.readline()))
    client.communicate("\n")
    assert client.returncode == 0 and ends(left)


def told(server: ForkServer, script: str, folder: Path, code: int = 7) -> tuple[dict, subprocess.CompletedProcess[str]]:
    reader, writer = os.pipe()
    os.write(writer, b"from pipe")
    done = run(
        server, script, str(code), str(reader), input="typed", cwd=folder, pass_fds=[reader],
        env={**os.environ, "GIVEN": "ä b"},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]),
    )  # fmt: skip
    os.close(reader)
    os.close(writer)
    return json.loads(done.stdout.splitlines()[0]), done


def test_it_has_the_callers_arguments_environment_folder_files_and_signals_and_its_exit_code(server, script, tmp_path):
    found, done = told(server, script, tmp_path)
    drawn = found.pop("drawn")
    assert found == {
        "name": "__main__", "arguments": ["7", found["arguments"][1]], "given": "ä b", "folder": str(tmp_path),
        "has": ["json.tool", "numpy"], "helper": 5, "input": "typed", "blocked": [signal.SIGUSR1], "leads": True,
        "file": "from pipe",
    }  # fmt: skip
    assert done.returncode == 7 and done.stderr == "to stderr\n" and done.stdout.endswith("\nbye\n")
    assert told(server, script, tmp_path, 0)[0]["drawn"] != drawn, "two processes draw the same numbers"


def test_forked_processes_draw_ids_of_tasks_of_their_own(server, tmp_path):
    """Two callers whose tasks have one id kill the worker that both call. Actor classes draw at their import."""
    assert len({run(server, "-c", RAYS_IDS).stdout for _ in range(4)}) == 4
    (tmp_path / "actors.py").write_text("import ray\n@ray.remote\nclass Actor: pass\n")
    (tmp_path / "draws.py").write_text("import ray\nray.WorkerID.from_random()\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    started = {name: ForkServer(environment, [name]) for name in ("actors", "draws")}
    actors, draws = ([run(one, "-c", RAYS_IDS, env=environment) for _ in range(2)] for one in started.values())
    assert actors[0].stdout != actors[1].stdout and not actors[0].stderr
    assert all("a new interpreter runs" in one.stderr for one in draws)
    for one in started.values():
        one.close()


def test_code_modules_and_exceptions_end_as_in_a_new_interpreter(server, tmp_path):
    code = "import sys; print(sys.argv, __name__); 1 / 0"
    for arguments in (
        ["-c", code, "x"],
        ["-m", "json.tool", "--help"],
        ["-c", "raise SystemExit('no')"],
        ["-c", "exit()"],
    ):
        forked = run(server, "-u", *arguments)
        fresh = subprocess.run([sys.executable, *arguments], text=True, capture_output=True)
        assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
        assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_signal_reaches_the_process_and_its_end_by_one_is_the_clients(server):
    for number, sent in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGKILL, signal.SIGKILL)):
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        client = subprocess.Popen([server.python, "-c", code], stdout=subprocess.PIPE, text=True)
        process = os.pidfd_open(int(client.stdout.readline()))
        client.send_signal(sent)
        assert client.wait(100) == -number
        assert ends(process)
    assert run(server, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)").returncode == -signal.SIGABRT


def test_processes_that_multiprocessing_spawns_are_forked_too(server, tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing, os, sys\n"
        "def work(queue): queue.put('json.tool' in sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=work, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get())\n"
        "    process.join()\n"
        "    sys.exit(process.exitcode)\n"
    )
    for executable, expected in ((server.python, "True\n"), (sys.executable, "False\n")):
        done = run(server, str(tmp_path / "script.py"), env={**os.environ, PYTHON: executable})
        assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["-c", "print(1)"], {"OMP_NUM_THREADS": "9"}, "OMP_NUM_THREADS is '9'"),
        (["-c", "print(1)"], {"LD_PRELOAD": "/nowhere.so"}, "LD_PRELOAD is '/nowhere.so'"),
        (["-X", "utf8", "-c", "print(1)"], {}, "got -X"),
    ],
)
def test_what_cannot_be_forked_runs_in_a_new_interpreter_that_says_why(server, arguments, environment, reason):
    done = run(server, *arguments, env={**os.environ, **environment})
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert reason in done.stderr and "a new interpreter runs" in done.stderr


def test_a_server_that_cannot_import_is_told_of_and_replaced_by_new_interpreters(caplog):
    server = ForkServer(os.environ, ["embedrl_verl.no_such_module"])
    done = run(server, "-c", "print(1)")
    assert done.stdout == "1\n" and "a new interpreter runs" in done.stderr
    server._process.wait()
    server.close()
    assert "no_such_module" in caplog.text


def test_an_import_that_starts_a_thread_is_refused(caplog, tmp_path, monkeypatch):
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    server = ForkServer({**os.environ, "PYTHONPATH": str(tmp_path)}, ["threads"])
    server._process.wait()
    server.close()
    assert "must have one thread" in caplog.text


def test_when_it_ends_so_does_what_it_has_forked():
    server = ForkServer(os.environ, [])
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    client = subprocess.Popen([server.python, "-c", code], stdout=subprocess.PIPE, text=True)
    process = os.pidfd_open(int(client.stdout.readline()))
    server.close()
    assert client.wait(100) != 0 and ends(process)
    assert not Path(server.python).exists()


def test_it_starts_when_it_is_first_used():
    server = ForkServer(os.environ, [], on_demand=True)
    assert server._process is None
    assert run(server, "-c", "print(1)").stdout == "1\n" and server._process is not None
    server.close()
    unused = ForkServer(os.environ, [], on_demand=True)
    unused.close()
    assert not Path(unused.python).exists()


def test_a_recipe_has_one_until_it_ends(tmp_path):
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(
        f"source {ROOT / 'recipes' / 'common.sh'}\nstart_fork_server\necho $PYTHON; echo $EMBEDRL_FORK_PYTHON; read\n"
    )
    environment = {**os.environ, "PYTHON": sys.executable, "VERL_PLATFORM": "cpu"}
    environment.pop(PYTHON, None)
    script = subprocess.Popen(
        ["bash", str(recipe)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    python = script.stdout.readline().strip()
    assert python == script.stdout.readline().strip() and os.access(python, os.X_OK)
    keeper = next(
        one for one in psutil.Process(script.pid).children() if "embedrl_verl.platforms.forkserver" in one.cmdline()
    )
    kept = os.pidfd_open(keeper.pid)
    script.communicate("\n")
    assert ends(kept) and not Path(python).exists()


def test_every_process_has_a_place_of_its_own_to_look_for_vllms_ports(server):
    """Also one that another has started; a user's own stays."""
    say = "import os, subprocess; print(os.environ['VLLM_PORT'], flush=True)"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("VLLM_PORT")}
    nested = f"{say}; subprocess.run([{server.python!r}, '-c', {say!r}])"
    ports = run(server, "-c", nested, env=environment).stdout.split()
    assert len(set(ports)) == 2 and all(int(port) in ports_given_to_nobody() for port in ports)
    assert run(server, "-c", say, env={**environment, "VLLM_PORT": "7"}).stdout == "7\n"


def test_what_a_program_leaves_open_is_written_and_a_full_device_is_an_error(server, tmp_path):
    code = f"file = open({str(tmp_path / 'left')!r}, 'w'); file.write('data')\ndef keep(): return file, keep"
    assert run(server, "-c", code).returncode == 0 and (tmp_path / "left").read_text() == "data"
    buffered = ForkServer({name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}, [])
    with open("/dev/full", "w") as full:
        command, environment = [buffered.python, "-c", "print(1)"], buffered._environment
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=100)
    assert done.returncode == 120 and b"No space left" in done.stderr
    buffered.close()


def test_code_has_no_future_of_the_server_and_its_spawned_children_find_its_script(server, tmp_path):
    assert run(server, "-c", "def f(x: int): pass\nprint(f.__annotations__)").stdout == "{'x': <class 'int'>}\n"
    (tmp_path / "relative.py").write_text(
        "import multiprocessing\n"
        "def work(): print(__file__)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    done = run(server, "relative.py", cwd=tmp_path, env={**os.environ, PYTHON: server.python})
    assert done.stdout == f"{tmp_path / 'relative.py'}\n", done.stderr


def test_a_signal_that_comes_while_the_process_begins_is_not_lost(server):
    """SIGTERM as soon as the server has answered, in any of the processes' first milliseconds."""
    clients = [subprocess.Popen([server.python, "-c", "import time; time.sleep(600)"]) for _ in range(8)]
    for client in clients:
        while not any("forkserver" in word for word in psutil.Process(client.pid).cmdline()):
            pass  # it is still the shell, which any signal ends
        client.terminate()
    assert {client.wait(100) for client in clients} == {-signal.SIGTERM}


def test_ignored_signals_the_umask_and_closed_files_are_the_clients(server, tmp_path):
    code = "import os, signal as s; print(s.getsignal(s.SIGHUP) == s.SIG_IGN, oct(os.umask(0)), os.read(0, 9))"
    command = f"umask 027; trap '' HUP; {server.python} -c '{code}' <&-"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=100)
    assert done.stdout == "True 0o27 b''\n", done.stderr


def test_when_the_server_is_killed_so_is_what_it_has_forked():
    server = ForkServer(os.environ, [])
    client = subprocess.Popen(
        [server.python, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    process = os.pidfd_open(int(client.stdout.readline()))
    server._process.kill()
    assert client.wait(100) == 1 and ends(process)
    server.close()


def test_more_open_files_than_can_be_handed_over_need_a_new_interpreter(server):
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(260)]
    done = run(server, "-c", "import os; print(len(os.listdir('/proc/self/fd')) > 260)", pass_fds=files)
    for file in files:
        os.close(file)
    assert done.stdout == "True\n" and "a new interpreter runs" in done.stderr


def test_a_client_that_says_nothing_stops_no_other(server):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(Path(server.python).parent / "socket"))
    assert run(server, "-c", "print(1)").stdout == "1\n"


def test_a_long_folder_for_temporary_files_is_no_obstacle(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    server = ForkServer(os.environ, [])
    assert run(server, "-c", "print(1)").stdout == "1\n"
    server.close()
    assert list(long.iterdir()) == []


def config(**ray_init):
    return OmegaConf.create({"ray_kwargs": {"ray_init": {"num_cpus": 2, **ray_init}}})


@pytest.mark.parametrize(
    ("ray_init", "environment", "forked"),
    [
        ({}, {}, True),
        ({"address": "local", "runtime_env": {"env_vars": {"A": "b"}}}, {}, True),
        ({"address": "auto"}, {}, False),
        ({}, {"RAY_ADDRESS": "1.2.3.4:5"}, False),
        ({}, {PYTHON: ""}, False),
        ({"runtime_env": {"py_executable": "mine"}}, {}, False),
    ],
)
def test_workers_of_a_cluster_that_the_run_starts_are_forked(ray_init, environment, forked, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)  # of this machine
    for name, value in {PYTHON: "/a b/python", **environment}.items():
        monkeypatch.setenv(name, value)
    before, changed = config(**ray_init), config(**ray_init)
    fork_ray_workers(changed)
    if forked:
        assert changed.ray_kwargs.ray_init.runtime_env.pop("py_executable") == "'/a b/python'"
        before.ray_kwargs.ray_init.setdefault("runtime_env", {})
    assert changed == before


@pytest.mark.parametrize(
    ("environment", "ray", "says"),
    [
        ({"VERL_PLATFORM": "cuda"}, "2.60.0", ""),
        ({PYTHON: ""}, "2.60.0", ""),
        ({}, "2.61.0", "for Ray 2.60"),
    ],
)
def test_no_server_on_gpus_or_with_another_ray(environment, ray, says, monkeypatch, caplog):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv(PYTHON, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(forkserver.importlib.metadata, "version", lambda name: ray)
    monkeypatch.setattr(forkserver, "ForkServer", None)
    before = os.environ.get(PYTHON)
    with fork_server():
        assert os.environ.get(PYTHON) == before
    assert says in caplog.text


def test_processes_of_a_run_say_that_they_have_the_plugin_and_keep_verls_log_level():
    """A library that vLLM imports would silence all of them below ERROR."""
    code = "import logging; logging.getLogger('some').warning('heard'); print(logging.root.level)"
    done = subprocess.run([python(), "-c", code], text=True, capture_output=True)
    assert done.stdout == f"{logging.WARNING}\n" and "heard" in done.stderr and "loaded" not in done.stderr
    done = subprocess.run([python(), "-m", "verl.trainer.main_ppo", "--help"], text=True, capture_output=True)
    assert "is loaded in verl" in done.stderr, done.stderr
