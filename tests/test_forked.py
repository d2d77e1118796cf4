# SPDX-License-Identifier: Apache-2.0
"""A forked process (tests/forked.py) is what a new interpreter would be, but for the imports."""

import os
import signal
import time

import pytest

from tests import forked
from tests.processes import alive

SCRIPT = """
import atexit, os, sys
import helper
atexit.register(print, "bye")
print(__name__, sys.argv[1:], os.environ["GIVEN"], "verl" in sys.modules, helper.VALUE)
print(os.getsid(0) == os.getpid(), file=sys.stderr, flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    return str(tmp_path / "script.py")


def test_arguments_environment_output_and_exit_code_are_the_callers(script, tmp_path):
    code, text = forked.run([script, "7", "b c"], tmp_path / "out.txt", {"GIVEN": "ä"})
    assert sorted(text.splitlines()) == sorted(["__main__ ['7', 'b c'] ä True 5", "True", "bye"])
    assert code == 7
    assert "GIVEN" not in os.environ


def test_a_module_and_an_exception(tmp_path):
    code, text = forked.run(["-m", "json.tool", "--help"], tmp_path / "out.txt", {})
    assert code == 0 and "usage:" in text
    (tmp_path / "raises.py").write_text("raise ValueError('oh')\n")
    code, text = forked.run([str(tmp_path / "raises.py")], tmp_path / "raised.txt", {})
    assert code == 1 and "ValueError: oh" in text


def test_a_signal_to_its_group_ends_it_and_what_it_has_started(tmp_path):
    (tmp_path / "script.py").write_text(
        "import subprocess, time\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)\n"
    )
    process = forked.start([str(tmp_path / "script.py")], tmp_path / "out.txt", {})
    while not (tmp_path / "out.txt").exists() or not (tmp_path / "out.txt").read_text().endswith("\n"):
        assert process.is_alive()
        time.sleep(0.01)
    child = int((tmp_path / "out.txt").read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode != 0
    deadline = time.monotonic() + 60
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
