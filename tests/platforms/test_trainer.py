# SPDX-License-Identifier: Apache-2.0
"""Two runs on one machine never share verl's sockets for weights."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import claims
from embedrl_verl.platforms.claims import SOCKETS, claim_weight_sockets

HOLDER = """
import fcntl, sys
claim = open(sys.argv[1] + "/rl-colocate-zmq-01000000.embedrl.lock", "w")
fcntl.flock(claim, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the sockets of job 01000000; closing its stdin ends it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as process:
        assert process.stdout.readline() == b"holds\n"
        yield process
        process.kill()


def test_a_second_run_of_the_same_job_number_is_refused_and_told_what_to_do(other_run, tmp_path):
    with pytest.raises(ResourceError, match=r"(?s)job id 01000000.*/tmp of its own"):
        claim_weight_sockets("01000000", folder=tmp_path, wait_s=0.2)
    claim_weight_sockets("02000000", folder=tmp_path, wait_s=0).close()  # another job of one cluster


def test_a_run_that_was_killed_leaves_nothing_behind_that_stops_the_next(other_run, tmp_path):
    other_run.kill()
    other_run.wait()
    claim = claim_weight_sockets("01000000", folder=tmp_path, wait_s=0)
    with pytest.raises(ResourceError):
        claim_weight_sockets("01000000", folder=tmp_path, wait_s=0)
    claim.close()


def test_a_run_waits_for_one_that_is_ending(other_run, tmp_path, caplog, monkeypatch):
    sleep = time.sleep

    def end_the_other(seconds):
        if not other_run.stdin.closed:
            other_run.stdin.close()
        sleep(seconds)

    monkeypatch.setattr(claims.time, "sleep", end_the_other)
    claim_weight_sockets("01000000", folder=tmp_path, wait_s=30).close()
    assert caplog.text.count("waiting up to 30 s") == 1


def test_a_lock_of_another_user_can_be_taken(tmp_path):
    (tmp_path / "rl-colocate-zmq-01000000.embedrl.lock").touch(mode=0o444)
    with claim_weight_sockets("01000000", folder=tmp_path, wait_s=0) as claim:
        assert not claim.writable()


def test_verl_still_names_the_sockets_after_the_job_alone(monkeypatch):
    monkeypatch.setenv("VERL_RAY_JOB_ID", "01000000")
    monkeypatch.setenv("VERL_REPLICA_RANK", "0")
    monkeypatch.delenv("VERL_ZMQ_BASE_TRAINER_RANK", raising=False)
    handle = vLLMColocateWorkerExtension._get_zmq_handle(SimpleNamespace(model_runner=None, local_rank=0))
    assert handle == f"ipc://{SOCKETS}/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
