# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, a job loses nothing, doubles nothing and asks for no answer twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command", ["annotate", "filter"])
def test_a_job_killed_at_any_write_ends_as_an_unbroken_one(command, tmp_path):
    child = [sys.executable, str(Path(__file__).with_name("killed_child.py")), str(tmp_path), command]
    result = subprocess.run(child, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["different"] == found["repeated"] == []
    assert found["kills"] > 10 and found["again"] > 3 and found["kept"] > 10  # else nothing was tried
