# SPDX-License-Identifier: Apache-2.0
"""What this machine gives its processes: memory, and GPUs that torch can use."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

MIN_DRIVER = 580
"""Of NVIDIA's driver: the wheels of torch 2.11 and vLLM 0.24 are built with CUDA 13."""
GPU_LINE = "pip install -r requirements/gpu.txt"
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """Bytes: what more can be used, and all there is. Pages that only hold parts of files count as free."""

    available: int
    total: int


def machine_memory() -> Memory:
    """Of the machine or, where one of this process's control groups has a lower limit (a container, a batch job), of
    that group. A group's limit holds for all groups below it."""
    machine = psutil.virtual_memory()
    available, total = machine.available, machine.total
    for folder, limit_file, used_file, reclaimable in _own_groups():
        limit = (folder / limit_file).read_text().strip() if (folder / limit_file).is_file() else "max"
        if limit != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = max(int((folder / used_file).read_text()) - int(counts.get(reclaimable, 0)), 0)
            total, available = min(total, int(limit)), min(available, max(int(limit) - used, 0))
    return Memory(available, total)


def _own_groups() -> Iterator[tuple[Path, str, str, str]]:
    """The folder of each control group of this process, up to the root (version 2, version 1), with its files of limit
    and use and what it could give back. A container sees its own group as the root, under a path that may be the
    host's."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, *names
            if folder == root:
                break


def driver_problem() -> str | None:
    """Why torch cannot use the GPUs that are here; None where it can, or where there are none."""
    import torch

    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    drivers = listed.stdout.split()
    if listed.returncode or not drivers:
        return None
    major = drivers[0].split(".")[0]
    if major.isdigit() and int(major) < MIN_DRIVER:
        return (
            f"NVIDIA's driver must be {MIN_DRIVER} or newer for torch {torch.__version__} with CUDA 13; found "
            f"{drivers[0]}. Update the driver, or use a container with NVIDIA's forward-compatibility package"
        )
    if torch.version.cuda is None:
        return f"this machine has {len(drivers)} GPU(s), and torch {torch.__version__} is built for the CPU. {GPU_LINE}"
    return (
        f"nvidia-smi lists {len(drivers)} GPU(s) and torch {torch.__version__} can use none: look at "
        "CUDA_VISIBLE_DEVICES, and at python -c 'import torch; torch.zeros(1).cuda()'"
    )
