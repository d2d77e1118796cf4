# SPDX-License-Identifier: Apache-2.0
"""Python command lines in processes of their own without the many seconds of imports: multiprocessing's fork server
imports torch, transformers and verl once, and forks each process from there.

For tests of what a process does, not of how it comes up. It has its own arguments, environment, output file, session
and exit code, as if a shell had started it; `forked_main.py` is what it runs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ("verl.workers.engine_workers", "verl.utils.checkpoint.fsdp_checkpoint_manager", "sklearn.datasets", "peft")
MAIN = Path(__file__).with_name("forked_main.py")

# The server should have one thread when it forks; arrow's allocator would start a second.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def start(arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> ForkServerProcess:
    """Start `python ARGUMENTS` (a script, or `-m` and a module); what it prints goes to the file `output`.

    The process leads a session of its own, so its id is also that of its group.
    """
    request = {"arguments": list(arguments), "output": str(output), "environment": {**os.environ, **environment}}
    process = _context.Process(
        target=runpy.run_path, args=(str(MAIN),), kwargs={"init_globals": {"REQUEST": request}, "run_name": "forked"}
    )
    process.start()
    return process


def run(
    arguments: Sequence[str], output: Path, environment: Mapping[str, str], *, timeout_s: float = 600
) -> tuple[int, str]:
    """The same to the end: its exit code and what it has printed."""
    process = start(arguments, output, environment)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"not done in {timeout_s:.0f} s: {' '.join(arguments)}\n{output.read_text()[-4000:]}")
    return process.exitcode, output.read_text()
