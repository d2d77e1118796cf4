# SPDX-License-Identifier: Apache-2.0
"""What a process of `forked.py` runs: it becomes `python ARGUMENTS`. The caller sets the global `REQUEST`."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from typing import Any

_request: dict[str, Any] = globals()["REQUEST"]

os.setsid()
os.environ.clear()
os.environ.update(_request["environment"])
_output = os.open(_request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _descriptor in (1, 2):
    os.dup2(_output, _descriptor)
os.close(_output)
multiprocessing.set_start_method(None, force=True)  # its own children start as a new interpreter's would
_name, *_rest = _request["arguments"]
try:
    if _name == "-m":
        sys.argv = [_rest[0], *_rest[1:]]
        runpy.run_module(_rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [_name, *_rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(_name)))
        runpy.run_path(_name, run_name="__main__")
finally:
    atexit._run_exitfuncs()  # multiprocessing ends its processes without them
