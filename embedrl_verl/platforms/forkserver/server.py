# SPDX-License-Identifier: Apache-2.0
"""The server: imports modules, then forks a process for each request of `client.py`.

Standard input is a pipe that the owner holds. When it closes, and at SIGTERM, the server kills what it has forked,
removes its folder and ends.
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
import selectors
import shutil
import signal
import socket
import sys
from typing import Any

from embedrl_verl.platforms.ports import some_ports

PYTHON = "EMBEDRL_FORK_PYTHON"
"""Environment variable: `ForkServer.python` of a server that is up; empty: start none."""
MAX_FILES = 253
"""Open files a request, as many as Linux passes at once."""
ANSWER_S = 30.0
READ_AT_IMPORT = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONHOME",
    "PYTHONIOENCODING",
    "PYTHONOPTIMIZE",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONWARNINGS",
    "RAY_JOB_ID",  # set for Ray's workers only
    "TMPDIR",
    "TORCH_COMPILE_DISABLE",
    "TRANSFORMERS_OFFLINE",
    "TZ",
    "VERL_LOGGING_LEVEL",
    "VERL_PLATFORM",
    "VERL_USE_EXTERNAL_PLUGINS",
)
"""Variables that libraries read while they are loaded: with other values than the server's, a new interpreter runs."""
_AT_START = {name: os.environ.get(name) for name in READ_AT_IMPORT}  # cv2 extends LD_LIBRARY_PATH
_OUR_PORT = "EMBEDRL_VLLM_PORT"  # tells VLLM_PORT of a fork from that of a user
_RUNS = (["embedrl_verl.train"], ["verl.trainer.main_ppo"])
_FLAGS = ("-u", "-B")


class _Refused(Exception):
    """What only a new interpreter can run."""


def _without_flags(arguments: list[str]) -> list[str]:
    return next((arguments[i:] for i, word in enumerate(arguments) if word not in _FLAGS), [])


def _is_loaded(library: str) -> bool:
    with open("/proc/self/maps") as maps:
        return any(line.rstrip().endswith(os.path.realpath(library)) for line in maps)


def _check(request: dict[str, Any], files: list[int]) -> None:
    if len(files) != len(request["files"]):
        raise _Refused(f"{len(request['files'])} open files cannot be handed over at once, {len(files)} came")
    for name, here in _AT_START.items():
        value = request["environment"].get(name)
        if value in (here, os.environ.get(name)) or (name == "RAY_JOB_ID" and value is None):
            continue
        if name == "LD_PRELOAD" and value and all(map(_is_loaded, value.split(":"))):
            continue  # vLLM names the OpenMP library that torch brings
        raise _Refused(f"{name} is {value!r}; the fork server was started with {here!r}")
    name, *rest = _without_flags(request["arguments"]) or ["(nothing)"]
    if (
        not (name == "-c" and rest)
        and not (name == "-m" and rest)
        and not os.path.isfile(os.path.join(request["folder"], name))
    ):
        raise _Refused(f"a fork server runs -c, -m or a script, after the flags {' '.join(_FLAGS)}; got {name}")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(connection, 8, MAX_FILES)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(head, "big"))), files


def _answer(connection: socket.socket, **values: Any) -> None:
    with contextlib.suppress(OSError):  # the client has gone
        connection.sendall(json.dumps(values).encode() + b"\n")


class _Server:
    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._waiting = listener, dict[int, socket.socket | None]()
        self._wake = os.pipe()
        for end in self._wake:
            os.set_blocking(end, False)
        self._selector = selectors.DefaultSelector()

    def serve(self) -> tuple[dict[str, Any], list[int]] | None:
        """None in the server when its owner has gone; in each process that it has forked, its request."""
        server = os.getpid()
        try:
            return self._serve()
        finally:
            if os.getpid() == server:
                self._kill_all()

    def _serve(self) -> tuple[dict[str, Any], list[int]] | None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        told_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: told_to_end.append(number))
        signal.set_wakeup_fd(self._wake[1])
        owner = sys.stdin.fileno()
        for source in (owner, self._wake[0], self._listener):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == owner or told_to_end:
                    return None
                if key.fileobj == self._wake[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake[0], 65536)
                    self._reap()
                elif key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.data in self._waiting:  # the client was killed, which is the process to everybody else
                    _kill(key.data)
                    self._selector.unregister(key.fileobj)

    def _accept(self) -> tuple[dict[str, Any], list[int]] | None:
        files: list[int] = []
        try:
            connection, _ = self._listener.accept()
        except OSError:  # too many open files; the client waits for the next round
            return None
        connection.settimeout(ANSWER_S)  # a client that stops half-way stops nobody else
        try:
            request, files = _receive(connection)
            _check(request, files)
            # Until the process has taken over the request, its signals wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            process = os.fork()
        except (_Refused, OSError, ValueError) as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            _answer(connection, refused=str(error))
            connection.close()
            for file in files:
                os.close(file)
            return None
        if process == 0:
            self._leave(connection)
            return request, files
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for file in files:
            os.close(file)
        _answer(connection, process=process)
        if request["waits"]:
            self._selector.register(connection, selectors.EVENT_READ, process)
            self._waiting[process] = connection
        else:
            connection.close()
            self._waiting[process] = None
        return None

    def _reap(self) -> None:
        for process, connection in list(self._waiting.items()):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # What it has left in its group, as the clients of its children. SIGTERM: multiprocessing's resource tracker
            # ignores it, takes away the shared memory that was left, and ends.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGTERM)
            _, status = os.waitpid(process, 0)
            del self._waiting[process]
            if connection is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                _answer(connection, status=os.waitstatus_to_exitcode(status))
                connection.close()

    def _leave(self, connection: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for one in (connection, self._listener, *self._waiting.values()):
            if one is not None:
                one.close()
        for end in self._wake:
            os.close(end)

    def _kill_all(self) -> None:
        for process in self._waiting:
            _kill(process)
        for process in self._waiting:
            os.waitpid(process, 0)


def _kill(process: int) -> None:
    """With what it has started in its group, which it leads as soon as it has taken over its request."""
    for kill in (os.killpg, os.kill):  # the group is made right after the fork
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Take the client's folder, environment, open files, signals, umask, cores and limit of open files."""
    os.setsid()
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    os.environ.clear()
    os.environ.update(request["environment"])
    above = max([2, *request["files"], *files]) + 1
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    moved = [os.dup2(file, above + place) for place, file in enumerate(files)]
    for file in {0, 1, 2, *files}:
        os.close(file)
    for number, file in zip(request["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    for number in {0, 1, 2}.difference(request["files"]):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(request["open_files"], hard), hard))
    for number in (signal.SIGCHLD, signal.SIGTERM, *request["ignored"]):
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    given = request["arguments"]
    if "-u" in given[: len(given) - len(_without_flags(given))]:
        sys.stdout.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    elif os.isatty(1):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


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
    if name == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        if not hasattr(sys.modules.get(rest[0]), "__path__"):
            sys.modules.pop(rest[0], None)  # runpy warns of a module that is imported already
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main_module = sys.modules["__main__"] = type(sys)("__main__")
    if name == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        code: str | bytes = rest[0]
    else:
        sys.argv = [name, *rest]
        sys.path.insert(0, os.path.dirname(os.path.realpath(name)))
        main_module.__file__ = os.path.abspath(name)
        with open(name, "rb") as file:
            code = file.read()
    exec(compile(code, "<string>" if name == "-c" else name, "exec", dont_inherit=True), main_module.__dict__)


def _status_of(arguments: list[str]) -> int:
    """Run, and what the interpreter would exit with; negative: the signal that it would end by."""
    try:
        _run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


_exit_status: list[int] = []


def _end_at_once() -> None:
    """The last exit function of a forked process: taking 8,000 modules apart would copy the shared pages (1 s)."""
    if _exit_status:
        if vars(sys.modules["__main__"]) is not globals():
            vars(sys.modules["__main__"]).clear()  # writes files that were left open
        gc.collect()
        try:
            sys.stdout.flush()
        except OSError as error:
            print(f"{error} while standard output was written", file=sys.stderr)
            _exit_status[0] = _exit_status[0] or 120
        if _exit_status[0] < 0:
            signal.signal(-_exit_status[0], signal.SIG_DFL)
            os.kill(os.getpid(), -_exit_status[0])
        os._exit(_exit_status[0])


def _import(modules: list[str]) -> None:
    """One after another. A library that vLLM imports silences the root logger below ERROR, which would silence the
    trainer's process too: the levels of the first import (verl's) stay."""
    levels: dict[Any, int] = {}
    if modules:
        _draw_class_ids_elsewhere()
    for name in modules:
        importlib.import_module(name)
        if not levels:
            levels = {logging.root: logging.root.level, **{one: one.level for one in logging.root.handlers}}
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


def _draws_of_two_forks() -> list[bytes]:
    """What Ray's generator gives in each of two forks of this process."""
    from ray._raylet import WorkerID

    drawn = []
    for _ in range(2):
        from_child, to_parent = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(to_parent, WorkerID.from_random().binary())
            os._exit(0)
        os.waitpid(process, 0)
        drawn.append(os.read(from_child, 1024))
        os.close(from_child)
        os.close(to_parent)
    return drawn


def main(descriptor: int, folder: str, modules: list[str]) -> None:
    """Import the modules, then serve the listening socket `descriptor`; `folder` holds its files."""
    sys.path.pop(0)  # this script's folder
    atexit.register(_end_at_once)  # the first to be registered is the last to run
    # Ray reads it when it is imported. Its workers end with the process of this id; that the raylet has ended they see
    # by their connection to it.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    _import(modules)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"a process must have one thread to be forked; the imports have started {threads - 1} more")
    if "ray" in sys.modules and len(set(_draws_of_two_forks())) != 2:
        raise SystemExit(
            "an import has drawn from Ray's generator of ids, so forked processes would draw the same ones"
        )
    paths = list(sys.path)
    gc.collect()
    gc.freeze()  # pages stay shared
    sys.stdout.flush()  # what imports have printed is not what the forked processes print
    mine = _Server(socket.socket(fileno=descriptor)).serve()
    if mine is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        request, files = mine
        _become(request, files)
        _refresh()
        sys.path[:] = paths
        _exit_status.append(_status_of(request["arguments"]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
