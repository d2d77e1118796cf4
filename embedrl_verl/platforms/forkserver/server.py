# SPDX-License-Identifier: Apache-2.0
"""The server: imports modules, then forks a process for each request of `client.py`.

Standard input is a pipe that the owner holds. When it closes, the server kills what it has forked and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import multiprocessing.process
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from embedrl_verl.platforms.ports import some_ports

PYTHON = "EMBEDRL_FORK_PYTHON"
"""Environment variable: `ForkServer.python` of a server that is up; empty: start none."""
MAX_FILES = 253
"""Open files a request, as many as Linux passes at once."""
ANSWER_S = 30.0
READ_AT_IMPORT = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCH_COMPILE_DISABLE"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "TMPDIR", "TZ"),
    *("PYTHONHASHSEED", "PYTHONHOME", "PYTHONIOENCODING", "PYTHONOPTIMIZE", "PYTHONPATH"),
    *("PYTHONUNBUFFERED", "PYTHONWARNINGS", "VERL_LOGGING_LEVEL", "VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS"),
    "RAY_JOB_ID",  # set for Ray's workers only
)
"""Variables that libraries read while they are loaded: with other values than the server's, a new interpreter runs."""
_AT_START = {name: os.environ.get(name) for name in READ_AT_IMPORT}  # cv2 extends LD_LIBRARY_PATH
_OUR_PORT = "EMBEDRL_VLLM_PORT"  # tells VLLM_PORT of a fork from that of a user
_RUNS = (["embedrl_verl.train"], ["verl.trainer.main_ppo"])
_FLAGS = ("-u", "-B")
Request = tuple[dict[str, Any], list[int]]
"""What `client.py` sends, and its open files under this process's numbers."""


class _Refused(Exception):
    """What only a new interpreter can run."""


def _without_flags(arguments: list[str]) -> list[str]:
    return next((arguments[i:] for i, word in enumerate(arguments) if word not in _FLAGS), [])


def _check(request: dict[str, Any]) -> None:
    for name, here in _AT_START.items():
        value = request["environment"].get(name)
        if value not in (here, os.environ.get(name)) and (name, value) != ("RAY_JOB_ID", None):
            raise _Refused(f"{name} is {value!r}; the fork server was started with {here!r}")
    name, *rest = _without_flags(request["arguments"]) or ["(nothing)"]
    if not (name in ("-c", "-m") and rest) and not os.path.isfile(os.path.join(request["folder"], name)):
        raise _Refused(f"a fork server runs -c, -m or a script, after the flags {' '.join(_FLAGS)}; got {name}")


def _answer(client: socket.socket, **values: Any) -> None:
    with contextlib.suppress(OSError):  # the client has gone
        client.sendall(json.dumps(values).encode() + b"\n")


def _kill(process: int) -> None:
    """With what it has started in its group, which it leads as soon as it has taken over its request."""
    for kill in (os.killpg, os.kill):  # the group is made right after the fork
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def serve(listener: socket.socket) -> Request | None:
    """None in the server when its owner has gone; in each process that it has forked, its request."""
    ends: dict[int, int] = {}  # pidfd -> process
    waiting: dict[socket.socket, int] = {}  # client -> process
    while True:
        ready = select.select([sys.stdin, listener, *ends, *waiting], [], [])[0]
        if sys.stdin in ready:
            for process in ends.values():
                _kill(process)
                os.waitpid(process, 0)
            return None
        for end in ends.keys() & set(ready):
            process = ends.pop(end)
            os.close(end)
            # What it has left in its group, as the clients of its children. SIGTERM: multiprocessing's resource tracker
            # ignores it, takes away the shared memory that was left, and ends.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGTERM)
            _, status = os.waitpid(process, 0)
            for client in [client for client, its in waiting.items() if its == process]:
                _answer(client, status=os.waitstatus_to_exitcode(status))
                del waiting[client]
                client.close()
        for client in waiting.keys() & set(ready):  # it was killed, which is the process to everybody else
            _kill(waiting.pop(client))
            client.close()
        if listener in ready:
            client, _ = listener.accept()
            forked, request, files = _fork(client)
            if forked == 0:
                for one in (listener, client, *waiting):
                    one.close()
                for end in ends:
                    os.close(end)
                return request, files
            for file in files:
                os.close(file)
            if forked:
                ends[os.pidfd_open(forked)] = forked
            if forked and request["waits"]:
                waiting[client] = forked
            else:
                client.close()


def _fork(client: socket.socket) -> tuple[int | None, dict[str, Any], list[int]]:
    """The process that takes over a client's request (0 in itself, None if it is refused), the request, its files."""
    request: dict[str, Any] = {}
    files: list[int] = []
    client.settimeout(ANSWER_S)  # one that stops half-way stops nobody else
    try:
        head, files, _, _ = socket.recv_fds(client, 8, MAX_FILES)
        with client.makefile("rb") as stream:
            request = json.loads(stream.read(int.from_bytes(head, "big")))
        _check(request)
        # Until the process has taken over the request, its signals wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        process = os.fork()
    except (_Refused, OSError, ValueError) as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        _answer(client, refused=str(error))
        return None, request, files
    if process:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        _answer(client, process=process)
    return process, request, files


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Take the client's folder, environment and open files under their numbers."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    above = max([2, *request["files"], *files]) + 1
    moved = [os.dup2(file, above + place) for place, file in enumerate(files)]
    for file in {0, 1, 2, *files}:
        os.close(file)
    for number, file in zip(request["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    for number in {0, 1, 2}.difference(request["files"]):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of a script ignores it
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    given = request["arguments"]
    unbuffered = "-u" in given[: len(given) - len(_without_flags(given))]
    if unbuffered or os.isatty(1):
        sys.stdout.reconfigure(line_buffering=True, write_through=unbuffered)  # type: ignore[union-attr]


def _refresh() -> None:
    """What modules have read or drawn while they were imported, and a new process has of its own."""
    # Where a spawned child looks for the main script.
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "ray._raylet" in sys.modules:  # RAY_AUTH_MODE and others
        sys.modules["ray._raylet"].Config.initialize("")
    for handler in logging.getLogger("vllm").handlers:
        handler.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    if os.environ.get("VLLM_PORT") == os.environ.get(_OUR_PORT):
        # Where vLLM begins to look for a port, which it listens at a little later: two that start side by side were
        # given the same one by the system.
        os.environ["VLLM_PORT"] = os.environ[_OUR_PORT] = str(some_ports()[0])
    # Children that multiprocessing spawns, as vLLM's engine, are forked too.
    multiprocessing.set_executable(os.environ.get(PYTHON, sys.executable))


def _run(arguments: list[str]) -> None:
    name, *rest = _without_flags(arguments)
    plugin = sys.modules.get("embedrl_verl.platforms.plugin")
    if plugin is not None and (name.endswith("/default_worker.py") or rest[:1] in _RUNS):
        plugin.say_loaded()
    sys.argv = [name, *rest] if name not in ("-c", "-m") else [name, *rest[1:]]
    if name == "-m":
        sys.path.insert(0, os.getcwd())
        if not hasattr(sys.modules.get(rest[0]), "__path__"):
            sys.modules.pop(rest[0], None)  # runpy warns of a module that is imported already
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, "" if name == "-c" else os.path.dirname(os.path.realpath(name)))
    main_module = sys.modules["__main__"] = type(sys)("__main__")
    if name != "-c":
        main_module.__file__ = os.path.abspath(name)
    source = rest[0].encode() if name == "-c" else Path(name).read_bytes()
    exec(compile(source, "<string>" if name == "-c" else name, "exec", dont_inherit=True), main_module.__dict__)


def _status_of(arguments: list[str]) -> int:
    """Run, and what the interpreter would exit with."""
    try:
        _run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # who has sent it says where it stands
        return 130
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


_exit_status: list[int] = []


def _end_at_once() -> None:
    """The last exit function of a forked process: taking 8,000 modules apart would copy the shared pages (1 s)."""
    if not _exit_status:
        return
    if vars(sys.modules["__main__"]) is not globals():
        vars(sys.modules["__main__"]).clear()  # writes files that were left open
    gc.collect()
    sys.stdout.flush()  # an error here is left to the interpreter, which ends with status 120
    os._exit(_exit_status[0])


def _import(modules: list[str]) -> None:
    """One after another. A library that vLLM imports silences the root logger below ERROR, which would silence the
    trainer's process too: the levels of the first import (verl's) stay."""
    levels: dict[Any, int] = {}
    if modules:
        _draw_class_ids_elsewhere()
    for name in modules:
        importlib.import_module(name)
        levels = levels or {logging.root: logging.root.level, **{one: one.level for one in logging.root.handlers}}
    for one, level in levels.items():
        one.setLevel(level)


def _draw_class_ids_elsewhere() -> None:
    """Ray's ids come from a generator in C++ that is seeded when it is first used. Used before a fork, it gives all
    forked processes the same ids of tasks and objects, and a worker that is sent two tasks of one id dies. What uses it
    in imports is the decorator of actor classes alone."""
    import ray.actor

    rays = ray.actor.ActorClassID

    class ActorClassID(rays):  # type: ignore[misc, valid-type]  # no type hints
        @classmethod
        def from_random(cls) -> Any:
            return rays(os.urandom(rays.size()))

    ray.actor.ActorClassID = ActorClassID


def main(descriptor: int, on_demand: bool, modules: list[str]) -> None:
    """Import the modules (`on_demand`: when somebody asks), then serve the listening socket `descriptor`."""
    sys.path.pop(0)  # this script's folder
    listener = socket.socket(fileno=descriptor)
    folder = os.path.dirname(listener.getsockname())
    if on_demand and sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
        shutil.rmtree(folder, ignore_errors=True)
        return
    atexit.register(_end_at_once)  # the first to be registered is the last to run
    # Ray reads it when it is imported. Its workers end with the process of this id; that the raylet has ended they see
    # by their connection to it.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    _import(modules)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"a process must have one thread to be forked; the imports have started {threads - 1} more")
    paths = list(sys.path)
    gc.collect()
    gc.freeze()  # pages stay shared
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as ray.init does for the processes that it starts
    sys.stdout.flush()  # what imports have printed is not what the forked processes print
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until now it ends the imports
    mine = serve(listener)
    if mine is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        request, files = mine
        _become(request, files)
        _refresh()
        sys.path[:] = paths
        _exit_status.append(_status_of(request["arguments"]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "on demand", sys.argv[3:])
