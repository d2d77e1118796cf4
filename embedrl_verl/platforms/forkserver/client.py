# SPDX-License-Identifier: Apache-2.0
"""Stands in for `python`: `python -SE client.py SOCKET ARGUMENTS...` runs `python ARGUMENTS` in a fork of the server.

Arguments, environment, folder and open files are handed over, and the exit status comes back. Signals that end a
program reach the process; SIGSTOP and SIGTSTP do not. When the client is killed, so is the process, with its group;
when the process ends, what it has left in its group gets SIGTERM. Umask, nice, cores and limits are those of the
server, its parent.

For Ray's workers the client ends at once: Ray knows them by the process id that they report. What the server refuses,
and everything when it has ended, runs in a new interpreter, and one line on standard error says why. Standard library
only: it starts in some 20 milliseconds.
"""

import contextlib
import json
import os
import signal
import socket
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_RAY_WORKER = "/ray/_private/workers/default_worker.py"


def _open_files() -> list[int]:
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    return [number for number in numbers if os.path.exists(f"/proc/self/fd/{number}") and os.get_inheritable(number)]


def main(address: str, arguments: list[str]) -> None:
    """Run `python ARGUMENTS` and end as it does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it waits needs no traceback
    files, waits = _open_files(), not any(argument.endswith(_RAY_WORKER) for argument in arguments)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps({**request, "files": files, "waits": waits}).encode()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
        socket.send_fds(server, [len(text).to_bytes(8, "big")], files)
        server.sendall(text)
        answers = server.makefile("rb")
        answer = json.loads(answers.readline() or '{"refused": "the fork server has ended"}')
    except OSError as error:  # also where there are more open files than can be handed over
        answer = {"refused": str(error)}
    if "refused" in answer:
        shown = " ".join(arguments)[:80]
        print(f"embedrl-verl: a new interpreter runs {shown!r}: {answer['refused']}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *arguments])
    if not waits:
        return
    process = answer["process"]

    def forward(received: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, received)

    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for file in files:  # a pipe ends when the process has closed it
        os.close(file)
    ended = answers.readline()  # nothing when the server was killed
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    status = json.loads(ended)["status"] if ended else 1
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)  # standard output is closed


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
