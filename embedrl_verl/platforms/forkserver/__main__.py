# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.platforms.forkserver OWNER [MODULE...]`: for shell scripts that start several processes.

Prints the stand-in for `python` (an empty line where no server is used) and serves until the process OWNER ends; the
modules are imported beside those of a run.
"""

import os
import select
import signal
import sys

from embedrl_verl.platforms.forkserver import MODULES, PYTHON, fork_server

if __name__ == "__main__":
    owner = os.pidfd_open(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the processes decide; then the script ends
    with fork_server([*MODULES, *sys.argv[2:]]):
        print(os.environ.get(PYTHON, ""), flush=True)
        select.select([owner], [], [])
