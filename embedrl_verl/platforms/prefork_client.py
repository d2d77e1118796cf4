# SPDX-License-Identifier: Apache-2.0
"""Runs a Python command line in a process forked by the prefork server (see prefork.py); stands where an interpreter
path is expected.

Standard library only and started with `-I -S`, so that it is there in a few milliseconds. It hands its command line,
environment, folder and open files to the server, forwards SIGTERM and SIGINT to the forked process, and ends with its
exit status.
"""

import array
import json
import os
import signal
import socket
import struct
import sys
from typing import NoReturn

SOCKET_VARIABLE = "EMBEDRL_PREFORK_SOCKET"
# Interpreter flags that Ray and multiprocessing pass on; they say nothing to an interpreter that has started.
STARTUP_FLAGS = frozenset({"-u", "-B", "-E", "-s"})
LENGTH = struct.Struct("!I")
STATUS = struct.Struct("!i")


def open_descriptors() -> list[int]:
    """Inheritable file descriptors of this process: 0, 1, 2 and what the parent passed on."""
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd <= 2 or _is_inheritable(fd)]


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # the descriptor of the listing itself, closed by now
        return False


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer when the other side has gone."""
    chunks = b""
    while len(chunks) < size and (chunk := connection.recv(size - len(chunks))):
        chunks += chunk
    return chunks


def main() -> NoReturn:
    """Forks through the server, waits, exits with the child's status; without a server, replaces itself by the
    interpreter.
    """
    arguments = sys.argv[1:]
    while arguments and arguments[0] in STARTUP_FLAGS:
        arguments.pop(0)
    path = os.environ.get(SOCKET_VARIABLE)
    forkable = bool(arguments) and (arguments[0] == "-c" or not arguments[0].startswith("-"))
    if not path or not forkable:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    descriptors = open_descriptors()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except (ConnectionRefusedError, FileNotFoundError) as error:
        print(
            f"the prefork server has ended ({error}); its own error is above. Starting {sys.executable}.",
            file=sys.stderr,
        )
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    request = {
        "argv": arguments,
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "descriptors": descriptors,
        "pid": os.getpid(),
        "group": os.getpgrp(),
    }
    body = json.dumps(request).encode("utf-8", "surrogateescape")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    connection.sendmsg([LENGTH.pack(len(body))], ancillary)
    connection.sendall(body)
    pid_bytes = receive_exactly(connection, STATUS.size)
    if len(pid_bytes) < STATUS.size:
        sys.exit("prefork server must answer with a process id; it closed the connection. Its own error is in its log.")
    (pid,) = STATUS.unpack(pid_bytes)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: os.kill(pid, received))
    status = receive_exactly(connection, STATUS.size)
    os._exit(STATUS.unpack(status)[0] if len(status) == STATUS.size else 1)


if __name__ == "__main__":
    main()
