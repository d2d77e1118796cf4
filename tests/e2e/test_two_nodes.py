# SPDX-License-Identifier: Apache-2.0
"""A run on a Ray cluster of two nodes, which this machine plays with two `ray start`.

Its processes are not forked and take minutes to start, so it is left to `bash scripts/test.sh -m nightly`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from embedrl_verl.platforms.forkserver import PYTHON
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from tests.e2e import harness

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]

STEPS = 2
PLACES = {"trainer.default_local_dir": "checkpoints", "trainer.rollout_data_dir": "rollouts"}


def ray_start(port: int, folder, environment, *arguments: str) -> subprocess.Popen[bytes]:
    """A node with slots for one rank; what it prints is in its folder."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--num-cpus=12", "--num-gpus=1"]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [*command, "--disable-usage-stats", "--block"], cwd=folder, env=environment, stdout=log, stderr=log
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of two nodes. The second one's working directory and environment are not those of the run."""
    port, folders = free_port(), [tmp_path_factory.mktemp(name) for name in ("head", "other")]
    bare = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "RAY_AUTH_MODE": "disabled"}
    head = ray_start(port, folders[0], {**bare, **CPU_ENV}, "--head", f"--port={port}", "--include-dashboard=false")
    started = [head]
    try:
        wait_for("Ray runtime started", folders[0], head)
        started.append(ray_start(port, folders[1], bare, f"--address=127.0.0.1:{port}"))
        wait_for("Ray runtime started", folders[1], started[1])
        yield f"127.0.0.1:{port}"
    finally:
        for node in reversed(started):
            node.terminate()
            node.wait()


def wait_for(text: str, folder, process: subprocess.Popen[bytes]) -> None:
    with (folder / "log.txt").open() as log:
        found = ""
        while text not in found:
            assert process.poll() is None, found
            found += log.readline()


@pytest.fixture(scope="module")
def two_nodes(cluster, inputs, tmp_path_factory):
    """Started as a person does, with output folders relative to the working directory."""
    folder = tmp_path_factory.mktemp("run")
    kept = [one for one in harness.overrides(inputs, folder, steps=STEPS) if one.split("=")[0] not in PLACES]
    ray = [
        f"ray_kwargs.ray_init.address={cluster}",
        *(f"ray_kwargs.ray_init.{name}=null" for name in ("num_cpus", "num_gpus")),
    ]
    places = [f"{key}={value}" for key, value in PLACES.items()]
    environment = {name: value for name, value in os.environ.items() if name != PYTHON}
    environment |= {**CPU_ENV, "RAY_AUTH_MODE": "disabled", "VERL_FILE_LOGGER_PATH": "metrics.jsonl"}
    done = subprocess.run(
        [sys.executable, "-m", "embedrl_verl.train", *kept, *ray, *places, "trainer.nnodes=2", "trainer.save_freq=2"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return harness.Run(folder, done.stdout + done.stderr, done.returncode)


def test_two_nodes_give_the_rewards_and_losses_of_one(two_nodes, inputs, tmp_path):
    one = harness.run(inputs, tmp_path, steps=STEPS, ranks=2)
    assert one.code == 0, one.output[-6000:]
    for step in range(1, STEPS + 1):
        for name in ("critic/score/mean", "actor/loss", "actor/kl_loss", "actor/grad_norm"):
            assert two_nodes.metrics[step][name] == pytest.approx(one.metrics[step][name], abs=1e-5), (step, name)


def test_metrics_progress_dumps_and_checkpoints_are_where_the_run_was_started(two_nodes):
    assert set(two_nodes.metrics) == {0, 1, 2}
    assert f"EG-RL: step {STEPS}/{STEPS}  " in two_nodes.output
    assert len(two_nodes.dump("rollouts", 1)) == 32
    shards = two_nodes.folder / "checkpoints" / "global_step_2" / "actor"
    assert len(list(shards.glob("model_world_size_2_rank_*.pt"))) == 2
