# SPDX-License-Identifier: Apache-2.0
"""Memory that the processes here may have: the machine's, or less where a container or a batch job has a limit.

Linux counts and limits memory by control groups (kernel documentation: cgroup-v2, "Memory Interface Files"; cgroup-v1,
"Memory Resource Controller"). A group's limit holds for all groups below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """Bytes: what more can be used, and all there is. Pages that only hold parts of files count as free."""

    available: int
    total: int


def machine_memory() -> Memory:
    """Of the machine or, where one of this process's control groups has a lower limit, of that group."""
    machine = psutil.virtual_memory()
    available, total = machine.available, machine.total
    for limit, used in _limited_groups():
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return Memory(available, total)


def _limited_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be given back) of each control group of this process that has a limit."""
    for folder, limit, usage, reclaimable in _own_groups():
        most = (folder / limit).read_text().strip() if (folder / limit).is_file() else "max"
        if most == "max":
            continue
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(counts.get(reclaimable, 0))
        yield int(most), max(used, 0)


def _own_groups() -> Iterator[tuple[Path, str, str, str]]:
    """The folder of each control group of this process, up to the root, and what limit, usage and reclaimable bytes are
    called there. A container sees its own group as the root, under a path that may be the host's."""
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
