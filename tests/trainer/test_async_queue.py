# SPDX-License-Identifier: Apache-2.0
"""Prompts in flight survive a checkpoint of the real TransferQueue, with their pairs and the Embedder's inputs."""

import json
import subprocess
from pathlib import Path

import pytest

from embedrl_verl.platforms.forkserver import python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    script = Path(__file__).with_name("async_queue_checkpoint.py")
    command = [python(), str(script), str(tmp_path_factory.mktemp("queue"))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


def test_a_prompts_status_is_written_beside_its_pair(restored):
    """The queue merges tags, so that the agent loop's status leaves the pair's tags alone."""
    tags = restored["tags"]
    assert (tags["status"], tags["is_prompt"], tags["global_steps"]) == ("finished", True, 1)
    assert (tags["embedrl_pair_id"], tags["embedrl_side"], tags["embedrl_group_size"]) == ("p1", "query", 2)


def test_whole_groups_and_their_rows_go_on_and_the_trained_batch_is_gone(restored):
    rows = {f"{prompt}_{session}_0" for prompt in ("p1-query", "p1-target", "p2-query") for session in (0, 1)}
    prompts = {f"p{pair}-{side}" for pair in (1, 2, 3) for side in ("query", "target")}
    assert restored["kept"] == 6
    assert set(restored["train"]) == prompts | rows | {"p2-target_0_0"}
    assert set(restored["embed"]) == rows, "an input whose prompt is generated anew is dropped"
    assert restored["inputs"] == [list(range(6))], "Embedder inputs are restored"


def test_what_was_running_is_generated_anew_with_its_media_in_its_old_group(restored):
    assert restored["reissued"] == 3 and restored["reissued_as_they_were"]
    assert restored["steps"] == {
        **dict.fromkeys(("p1-query", "p1-target", "p2-query"), 1),
        **dict.fromkeys(("p2-target", "p3-query", "p3-target"), 7),
    }
    assert restored["groups"] == {f"p{i}-{side}": f"p{i}-query" for i in (1, 2, 3) for side in ("query", "target")}
