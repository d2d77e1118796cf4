# SPDX-License-Identifier: Apache-2.0
"""A forked process is what a new interpreter would be, but for the imports; what cannot be forked, one runs."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from embedrl_verl.platforms import forkserver
from embedrl_verl.platforms.forkserver import PYTHON, ForkServer, fork_ray_workers, fork_server, python
from embedrl_verl.platforms.ports import ports_given_to_nobody

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import atexit, json, os, random, sys
import helper
import numpy
atexit.register(print, "bye")
print(json.dumps({
    "name": __name__, "arguments": sys.argv[1:2], "given": os.environ.get("GIVEN"), "folder": os.getcwd(),
    "has": sorted({"json.tool", "numpy"} & set(sys.modules)), "helper": helper.VALUE, "input": sys.stdin.read(),
    "leads": os.getsid(0) == os.getpid(), "file": os.read(int(sys.argv[2]), 9).decode(),
    "drawn": [random.random(), float(numpy.random.rand())],
}))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
RAYS_IDS = "import ray._raylet as ray; print(ray.TaskID.for_fake_task(ray.JobID.from_int(1)).hex())"
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def run(server: ForkServer, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([server.python, *arguments], text=True, capture_output=True, timeout=100, **options)


def start(server: ForkServer, code: str = SLEEPS) -> tuple[subprocess.Popen[str], int]:
    """A client, and a descriptor of the process whose number its code prints first."""
    client = subprocess.Popen([server.python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return client, os.pidfd_open(int(client.stdout.readline()))


def ends(process: int) -> bool:
    """Whether the process of this descriptor ends."""
    return bool(select.select([process], [], [], 100)[0])


@pytest.fixture(scope="module")
def server():
    """One that has imported little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(PYTHON, raising=False)
        server = ForkServer(os.environ, ["json.tool", "numpy.random"])
        yield server
        server.close()


@pytest.fixture
def another():
    """`another(modules, **variables)`: a server of a test's own; None takes a variable away."""
    started = []

    def make(modules=(), on_demand=False, **variables) -> ForkServer:
        environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
        started.append(ForkServer(environment, modules, on_demand=on_demand))
        return started[-1]

    yield make
    for one in started:
        if Path(one.python).exists():
            one.close()


def test_it_has_the_callers_arguments_environment_folder_and_files_and_its_exit_code(server, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    results = []
    for code in (7, 0):
        reader, writer = os.pipe()
        os.write(writer, b"from pipe")
        environment = {**os.environ, "GIVEN": "ä b"}
        options = {"input": "typed", "cwd": tmp_path, "pass_fds": [reader], "env": environment}
        done = run(server, str(tmp_path / "script.py"), str(code), str(reader), **options)
        os.close(reader)
        os.close(writer)
        results.append(json.loads(done.stdout.splitlines()[0]))
        assert done.returncode == code and done.stderr == "to stderr\n" and done.stdout.endswith("\nbye\n")
    drawn = [result.pop("drawn") for result in results]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1], "two processes draw the same numbers"
    assert results[0] == {
        "name": "__main__", "arguments": ["7"], "given": "ä b", "folder": str(tmp_path), "leads": True,
        "has": ["json.tool", "numpy"], "helper": 5, "input": "typed", "file": "from pipe",
    }  # fmt: skip


def test_forked_processes_draw_ids_of_tasks_of_their_own(server, another, tmp_path):
    """Two callers whose tasks have one id kill the worker that both call. Actor classes draw at their import."""
    (tmp_path / "actors.py").write_text("import ray\n@ray.remote\nclass Actor: pass\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    actors = another(["actors"], PYTHONPATH=str(tmp_path))
    of_runs = [subprocess.run([python(), "-c", RAYS_IDS], text=True, capture_output=True).stdout for _ in range(2)]
    drawn = [run(server, "-c", RAYS_IDS).stdout for _ in range(2)] + of_runs  # the last have MODULES
    drawn += [run(actors, "-c", RAYS_IDS, env=environment).stdout for _ in range(2)]
    assert len(set(drawn)) == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import sys; print(sys.argv, __name__); 1 / 0", "x"],
        ["-m", "json.tool", "--help"],
        ["-c", "raise SystemExit('no')"],
        ["-c", "def f(x: int): pass\nprint(f.__annotations__); exit()"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"],
    ],
)
def test_code_modules_exceptions_and_signals_end_as_in_a_new_interpreter(server, arguments):
    forked = run(server, "-u", *arguments)
    fresh = subprocess.run([sys.executable, *arguments], text=True, capture_output=True)
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_what_a_program_leaves_open_is_written_and_a_full_device_is_an_error(server, another, tmp_path):
    code = f"file = open({str(tmp_path / 'left')!r}, 'w'); file.write('data')\ndef keep(): return file, keep"
    assert run(server, "-c", code).returncode == 0 and (tmp_path / "left").read_text() == "data"
    buffered = another(PYTHONUNBUFFERED=None)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [buffered.python, "-c", "print(1)"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=100)
    assert done.returncode == 120 and b"No space left" in done.stderr


def test_spawned_children_are_forked_too_and_find_the_script(server, tmp_path):
    (tmp_path / "relative.py").write_text(
        "import multiprocessing, sys\n"
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
        done = run(server, "relative.py", cwd=tmp_path, env={**os.environ, PYTHON: executable})
        assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_process_and_its_end_by_one_is_the_clients(server, number):
    client, process = start(server)
    client.send_signal(number)
    assert client.wait(100) == -number and ends(process)


def test_a_signal_that_comes_while_the_process_begins_is_not_lost(server):
    """SIGTERM as soon as the server has answered, in any of the processes' first milliseconds."""
    clients = [subprocess.Popen([server.python, "-c", "import time; time.sleep(600)"]) for _ in range(8)]
    for client in clients:
        while not any("forkserver" in word for word in psutil.Process(client.pid).cmdline()):
            pass  # it is still the shell, which any signal ends
        client.terminate()
    assert {client.wait(100) for client in clients} == {-signal.SIGTERM}


def test_what_a_process_leaves_in_its_group_ends_with_it(server):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    client, left = start(server, code)
    client.communicate("\n")
    assert client.returncode == 0 and ends(left)


@pytest.mark.parametrize("end", [ForkServer.close, lambda server: server._process.kill()])
def test_when_the_server_ends_so_does_what_it_has_forked(another, end):
    server = another()
    client, process = start(server)
    end(server)
    assert client.wait(100) != 0 and ends(process)
    assert Path(server.python).exists() is (end is not ForkServer.close)


def test_nobody_waits_for_a_worker_of_ray_which_ends_with_the_server(another, tmp_path):
    script = tmp_path / "ray" / "_private" / "workers" / "default_worker.py"
    script.parent.mkdir(parents=True)
    script.write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    os.mkfifo(tmp_path / "number")
    server = another()
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([server.python, "-u", str(script), str(tmp_path / "number")], check=True, timeout=100, **nowhere)
    process = os.pidfd_open(int((tmp_path / "number").read_text()))
    server.close()
    assert ends(process)


@pytest.mark.parametrize(
    ("arguments", "environment", "files", "reason"),
    [
        (["-c", "print(1)"], {"OMP_NUM_THREADS": "9"}, 0, "OMP_NUM_THREADS is '9'"),
        (["-X", "utf8", "-c", "print(1)"], {}, 0, "got -X"),
        (["-c", "print(1)"], {}, 260, "Invalid argument"),  # Linux passes 253 files at once
    ],
)
def test_what_cannot_be_forked_runs_in_a_new_interpreter_that_says_why(server, arguments, environment, files, reason):
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(files)]
    done = run(server, *arguments, env={**os.environ, **environment}, pass_fds=opened)
    for file in opened:
        os.close(file)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert reason in done.stderr and "a new interpreter runs" in done.stderr


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import embedrl_verl.no_such_module", "no_such_module"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "one thread"),
    ],
)
def test_a_server_that_cannot_import_is_told_of_and_replaced_by_new_interpreters(another, code, says, tmp_path, caplog):
    (tmp_path / "module.py").write_text(code)
    server = another(["module"], PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run(server, "-c", "print(1)")
    assert done.stdout == "1\n" and "a new interpreter runs" in done.stderr
    server._process.wait()
    server.close()
    assert says in caplog.text


def test_it_imports_when_it_is_first_used(another):
    server = another(["json.tool"], on_demand=True)
    assert run(server, "-c", "import sys; print('json.tool' in sys.modules)").stdout == "True\n"
    unused = another(["no_such_module"], on_demand=True)
    unused.close()
    assert unused._process.returncode in (0, -signal.SIGTERM) and not Path(unused.python).exists()


def test_every_process_has_a_place_of_its_own_to_look_for_vllms_ports(server):
    """Also one that another has started; a user's own stays."""
    say = "import os, subprocess; print(os.environ['VLLM_PORT'], flush=True)"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("VLLM_PORT")}
    nested = f"{say}; subprocess.run([{server.python!r}, '-c', {say!r}])"
    ports = run(server, "-c", nested, env=environment).stdout.split()
    assert len(set(ports)) == 2 and all(int(port) in ports_given_to_nobody() for port in ports)
    assert run(server, "-c", say, env={**environment, "VLLM_PORT": "7"}).stdout == "7\n"


def test_ctrl_c_ends_a_process_without_a_traceback_though_its_server_ignores_it(another):
    """The server of a recipe does, so that the stage decides."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = another()
    signal.signal(signal.SIGINT, before)
    client, process = start(server)
    client.send_signal(signal.SIGINT)
    assert ends(process) and client.wait(100) in (130, -signal.SIGINT)  # 130 once the client hands signals on


def test_a_recipe_has_one_until_it_ends(tmp_path):
    recipe = tmp_path / "recipe.sh"
    lines = (
        f"source {ROOT / 'recipes' / 'common.sh'}\nstart_fork_server\necho $PYTHON; echo $EMBEDRL_FORK_PYTHON; read\n"
    )
    recipe.write_text(lines)
    environment = {**os.environ, "PYTHON": sys.executable, "VERL_PLATFORM": "cpu"}
    environment.pop(PYTHON, None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    script = subprocess.Popen(["bash", str(recipe)], env=environment, **pipes)
    python = script.stdout.readline().strip()
    assert python == script.stdout.readline().strip() and os.access(python, os.X_OK)
    children = psutil.Process(script.pid).children()
    keeper = next(one for one in children if "embedrl_verl.platforms.forkserver" in one.cmdline())
    kept = os.pidfd_open(keeper.pid)
    script.communicate("\n")
    assert ends(kept) and not Path(python).exists()


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
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    for name, value in {PYTHON: "/a b/python", **environment}.items():
        monkeypatch.setenv(name, value)
    before, changed = (OmegaConf.create({"ray_kwargs": {"ray_init": {"num_cpus": 2, **ray_init}}}) for _ in range(2))
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
