# SPDX-License-Identifier: Apache-2.0
"""What the recipes for clusters render: each is run with stand-ins for Slurm's and Ray's commands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from embedrl_verl.platforms.compat import RAY_VERSION
from tests.recipes.calls import ROOT

CLUSTER = ROOT / "recipes" / "cluster"
SHOW = (
    'printf "%s|" "$NODE_RANK" "$MASTER_ADDR" "$MASTER_PORT" "$NNODES" "$GPUS_PER_NODE" "$RAY_AUTH_TOKEN" "$@"; echo\n'
)


def command(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{text}")
    file.chmod(0o755)
    return file


def bash(*arguments: str | Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": os.environ["HOME"], **variables}
    return subprocess.run(["bash", *map(str, arguments)], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Variables of a job on two nodes; `srun` runs its command once for each."""
    command(tmp_path / "bin", "scontrol", 'echo "first-of-$3"; echo second\n')
    command(tmp_path / "bin", "srun", 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done\n')
    command(tmp_path, "recipe.sh", SHOW)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    return {**job, "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(tmp_path), "RECIPE": "recipe.sh"}


def test_slurm_starts_the_recipe_on_every_node_of_one_cluster(slurm: dict[str, str], tmp_path: Path) -> None:
    done = bash(CLUSTER / "egrl.sbatch", "a.b=[1, 2]", path=tmp_path / "bin", **slurm)
    assert done.returncode == 0, done.stderr
    first, second = (line.split("|") for line in done.stdout.splitlines())
    assert first[:5] == ["0", "first-of-n[1-2]", "24711", "2", "4"] and first[6] == "a.b=[1, 2]"
    assert second == ["1", *first[1:]] and re.fullmatch("[0-9a-f]{32}", first[5])
    again = bash(CLUSTER / "egrl.sbatch", path=tmp_path / "bin", **slurm)
    assert again.stdout.split("|")[5] != first[5]
    command(tmp_path, "recipe.sh", "exit 7\n")
    assert bash(CLUSTER / "egrl.sbatch", path=tmp_path / "bin", **slurm).returncode == 7
    missing = bash(CLUSTER / "egrl.sbatch", path=tmp_path / "bin", **{**slurm, "RECIPE": "none.sh"})
    assert missing.returncode == 2 and "RECIPE must be a file" in missing.stderr and "none.sh" in missing.stderr


def test_a_ray_job_runs_the_recipe_with_the_variables_and_overrides_as_they_are(tmp_path: Path) -> None:
    """Ray hands the words after -- to a shell on the head; here that shell runs at once."""
    submit = 'test "$1 $2 $3" = "job submit --" || exit 9; shift 3; exec env -i "PATH=$PATH" "$@"\n'
    ray = command(tmp_path / "bin", "ray", submit)
    command(tmp_path, "recipe.sh", 'printf "%s|" "$PWD" "$RAY_ADDRESS" "$NNODES" "$OUT" "${SECRET:-}" "$@"\n')
    knobs = {"NNODES": "4", "OUT": "/shared/my runs", "SECRET": "x", "REPO": str(tmp_path), "RAY": str(ray)}
    done = bash(CLUSTER / "ray_job.sh", "recipe.sh", "a='b c'", path=tmp_path / "bin", **knobs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("|")[:-1] == [str(tmp_path), "auto", "4", "/shared/my runs", "", "a='b c'"]
    shown = bash(CLUSTER / "ray_job.sh", "recipe.sh", path=tmp_path / "bin", DRY_RUN="1", **knobs)
    assert shown.stdout.startswith(f"{ray} job submit -- bash -c ")
    assert bash(CLUSTER / "ray_job.sh", path=tmp_path / "bin").returncode == 2


def test_a_ray_job_hands_on_every_variable_of_the_recipes() -> None:
    files = [*(ROOT / "recipes").glob("run_egrl_qwen*.sh"), ROOT / "recipes" / "common.sh", ROOT / "recipes" / "gpu.sh"]
    text = "".join(file.read_text() for file in files)
    read = set(re.findall(r"\b([A-Z][A-Z_]*)=\$\{\1:-", text)) | set(re.findall(r"\$\{([A-Z]+_TP|[A-Z]+_PP):-", text))
    assert {"G", "PAIRS", "ACTOR_TP", "JUDGE_TP", "OFFLOAD", "REWARD"} <= read
    knobs = re.search(r"KNOBS=\((.*?)\)", (CLUSTER / "ray_job.sh").read_text(), re.S)
    # Of the cluster, not of the run.
    assert knobs and read - {"RAY_AUTH_MODE", "MASTER_PORT", "RAY_WAIT_SECONDS"} <= set(knobs[1].split())


def test_the_manifest_of_kuberay_asks_for_the_devices_that_its_recipe_uses() -> None:
    spec = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    settings = dict(word.split("=", 1) for word in spec["entrypoint"].split() if "=" in word)
    assert int(settings["NNODES"]) == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == settings["GPUS_PER_NODE"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["image"] == head["image"] and container["volumeMounts"] == head["volumeMounts"]
    assert cluster["rayVersion"].startswith(RAY_VERSION)
