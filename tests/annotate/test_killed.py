# SPDX-License-Identifier: Apache-2.0
"""Killed at any write and started again, a job loses nothing, asks nothing twice and writes the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("killed_child.py")


@pytest.mark.slow
def test_kill_9_at_every_write_changes_nothing(tmp_path):
    """Every third write of a job with four parts, refused requests and replies that are asked for again."""
    command = [sys.executable, str(CHILD), str(tmp_path), "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["different"] == []
    assert found["kills"] > 20 and found["again"] > 3  # else nothing was tried
    assert "part-00003.parquet" in found["files"] and "data_card.json" in found["files"]
