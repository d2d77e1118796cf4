# SPDX-License-Identifier: Apache-2.0
"""Starts the Python processes of a run by forking one that has imported everything, instead of importing in each.

A run has about ten Python processes (task runner, TransferQueue, actor, agent loop, rollout server, engine, ...), and
importing torch, verl and vLLM costs each 10 to 40 CPU seconds: on two cores that is two minutes before the first
step. Here one server process imports once; Ray is told to start workers with a small client instead of the
interpreter (verl's own key `ray_kwargs.ray_init.runtime_env.py_executable`), and so is multiprocessing in those
workers. The client asks the server to fork, with its command line, environment, folder and open files, and lives as
long as the forked process. Memory is shared until written.

For one machine without a GPU only: a CUDA context cannot be forked. The server refuses to fork when an import has
left a thread behind. Log lines and random state behave as in a new process; modules that read the environment while
being imported see the server's.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import multiprocessing.spawn
import os
import runpy
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import prefork_client
from embedrl_verl.platforms.prefork_client import LENGTH, SOCKET_VARIABLE, STATUS, receive_exactly

# What the processes of a run import; the heavy ones of each kind.
RUN_MODULES: tuple[str, ...] = (
    "verl.trainer.ppo.v1",
    "embedrl_verl.platforms.training_worker",
    "verl.experimental.reward_loop",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
)
PYTHON_VARIABLE = "EMBEDRL_PREFORK_PYTHON"
# What verl gives its workers by default and vLLM reads while it is imported.
VERL_ENV = {"VLLM_LOGGING_LEVEL": "WARN"}
# Libraries that start threads while they are imported are told not to.
SINGLE_THREAD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# Ray reads two variables once, when its library is loaded: a worker's job, which is always this one for the driver
# that starts a local cluster, and the process whose end ends the worker, for which the server's starter stands.
FIRST_RAY_JOB = "01000000"
_PR_SET_PDEATHSIG = 1
_MAX_DESCRIPTORS = 250


class _Server:
    """Accept, fork, reap; one thread. `lifetime` is a pipe whose end of file means that the starter has gone."""

    def __init__(self, listener: socket.socket, lifetime: int) -> None:
        self._listener = listener
        self._lifetime = lifetime
        self._clients: dict[int, socket.socket | None] = {}
        self._wakeup, wakeup_write = os.pipe()
        os.set_blocking(wakeup_write, False)
        signal.set_wakeup_fd(wakeup_write)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self._selector = selectors.DefaultSelector()
        for item in (listener, lifetime, self._wakeup):
            self._selector.register(item, selectors.EVENT_READ)

    def serve(self) -> None:
        """Until the starter has gone; then ends the forked processes."""
        while True:
            for key, _events in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._wakeup:
                    os.read(self._wakeup, 4096)
                    self._reap()
                elif key.fileobj == self._lifetime:
                    for pid in self._clients:
                        os.kill(pid, signal.SIGKILL)
                    return
                else:
                    self._client_gone(key.data)

    def _accept(self) -> None:
        connection, _address = self._listener.accept()
        header, descriptors, _flags, _peer = socket.recv_fds(connection, LENGTH.size, _MAX_DESCRIPTORS)
        if len(header) < LENGTH.size:
            connection.close()
            return
        request = json.loads(receive_exactly(connection, LENGTH.unpack(header)[0]).decode("utf-8", "surrogateescape"))
        pid = os.fork()
        if pid == 0:
            run_forked(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(STATUS.pack(pid))
        self._clients[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, data=pid)

    def _reap(self) -> None:
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._clients.pop(pid)
            if connection is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            self._selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):  # the client is gone too
                connection.sendall(STATUS.pack(code if code >= 0 else 128 - code))
            connection.close()

    def _client_gone(self, pid: int) -> None:
        """A client sends nothing after its request, so readable means that it was killed; its process must not
        outlive it.
        """
        connection = self._clients.get(pid)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
            self._clients[pid] = None
            os.kill(pid, signal.SIGKILL)


def run_forked(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """In the forked child: becomes what `python *request["argv"]` would be, with the client's environment, folder and
    files.
    """
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _join_group(request["pid"], request["group"])
        _install_descriptors(request["descriptors"], descriptors)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        _fresh_process_state()
        multiprocessing.spawn.set_executable(request["env"][PYTHON_VARIABLE])
        code = _run_command(list(request["argv"]))
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _finish(code)


def _join_group(client: int, group: int) -> None:
    """The client's process group when a parent in the server's session made it, else an own one. Ray signals a whole
    group when one of its workers ends, so workers must not share one."""
    shared = group != client and os.getsid(client) == os.getsid(0)
    os.setpgid(0, group if shared else 0)


def _run_command(arguments: list[str]) -> int:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def _install_descriptors(numbers: Sequence[int], received: Sequence[int]) -> None:
    """Puts the received files at the client's numbers and closes everything else, the server's own files included."""
    above = max(*numbers, *received) + 1
    parked = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in received]
    os.closerange(3, above)
    for number, descriptor in zip(numbers, parked, strict=True):
        os.dup2(descriptor, number, inheritable=True)
    keep = set(numbers)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in keep:
            with contextlib.suppress(OSError):  # the listing's own, closed by now
                os.close(descriptor)


def _fresh_process_state() -> None:
    """What a new process would have: settings that Ray reads from the environment once, a seed of its own (torch's
    generator has a fixed start in any process), and output line by line.
    """
    import numpy
    from ray._raylet import Config

    job = os.environ.get("RAY_JOB_ID", FIRST_RAY_JOB)
    if job != FIRST_RAY_JOB:
        raise ResourceError(
            f"prefork serves only a Ray cluster that the run started itself, whose job is {FIRST_RAY_JOB}; got {job}. "
            "Unset RAY_ADDRESS, or switch prefork off."
        )
    Config.initialize("")
    numpy.random.seed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _finish(code: int) -> NoReturn:
    """Ends like an interpreter: exit functions, buffers; not through the server's own stack."""
    import atexit

    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def preload(modules: Sequence[str]) -> None:
    """Imports `modules` and checks that the process may be forked. Raises ResourceError when an import has started a
    thread.
    """
    for name in modules:
        importlib.import_module(name)
    threads = [(Path("/proc/self/task") / task / "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if len(threads) != 1:
        raise ResourceError(
            f"a process that forks must have one thread; after importing {', '.join(modules)} it has {threads}. "
            "Set the variable that keeps it from starting (SINGLE_THREAD_ENV), or switch prefork off."
        )
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def prefork_server(modules: Sequence[str] = RUN_MODULES) -> Iterator[dict[str, str]]:
    """Runs a server for the time of the block and yields the environment variables that make workers use it.

    Set them before `ray.init` and pass PYTHON_VARIABLE's value as `ray_kwargs.ray_init.runtime_env.py_executable`.
    Returns at once: workers that ask early wait until the imports are done, and should an import fail, they say so and
    start as new interpreters. A server that already runs (its variables are set) is shared.
    """
    if SOCKET_VARIABLE in os.environ:
        yield {name: os.environ[name] for name in (SOCKET_VARIABLE, PYTHON_VARIABLE)}
        return
    folder = Path(tempfile.mkdtemp(prefix="embedrl-"))
    read_end, write_end = os.pipe()
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(folder / "socket"))
        listener.listen(128)
        wrapper = folder / "python"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{prefork_client.__file__}" "$@"\n')
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        ray_env = {"RAY_JOB_ID": FIRST_RAY_JOB, "RAY_RAYLET_PID": str(os.getpid())}
        command = [sys.executable, "-m", __name__, str(listener.fileno()), str(read_end), *modules]
        subprocess.Popen(
            command,
            env={**VERL_ENV, **os.environ, **SINGLE_THREAD_ENV, **ray_env},
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(), read_end),
            start_new_session=True,
        )
        listener.close()
        os.close(read_end)
        yield {SOCKET_VARIABLE: str(folder / "socket"), PYTHON_VARIABLE: str(wrapper)}
    finally:
        os.close(write_end)
        shutil.rmtree(folder)


def main() -> None:
    """`python -m embedrl_verl.platforms.prefork LISTENER_FD LIFETIME_FD MODULE...`, started by prefork_server."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    preload(sys.argv[3:])
    _Server(listener, int(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
