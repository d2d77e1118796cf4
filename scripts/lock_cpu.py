#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Resolve requirements/cpu.in into requirements/cpu.txt for Linux x86_64 and every supported Python.

One resolution for each minor version, merged into one list: a package whose version is the same everywhere is one plain
line, another gets a line with a marker for each version. The list is complete, so it is installed with --no-deps (pip
or uv), and it names no package index. Versions of the present list are kept where they still fit; pass --upgrade to
take the newest.

    .venv/bin/python scripts/lock_cpu.py [--upgrade]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
MINORS = ("3.10", "3.11", "3.12")
HEADER = (
    "# Made by scripts/lock_cpu.py from cpu.in: complete, so install it with --no-deps. Linux x86_64, Python 3.10-3.12."
)
LINE = re.compile(r"^(?P<pin>[A-Za-z0-9._-]+==\S+?)(?: ; (?P<marker>.+))?$")


def read_pins(path: Path, minor: str) -> list[str]:
    """The pins `name==version` of the merged list that hold for one minor version."""
    pins = []
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        if match and (match["marker"] is None or f"'{minor}'" in match["marker"]):
            pins.append(match["pin"])
    return pins


def resolve(uv: str, minor: str, present: list[str], upgrade: bool) -> list[str]:
    """The pins of one minor version, resolved by uv; `present` are preferred versions."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.txt"
        out.write_text("".join(f"{pin}\n" for pin in present))
        command = [uv, "pip", "compile", str(REQUIREMENTS / "cpu.in"), "-o", str(out)]
        command += ["--override", str(REQUIREMENTS / "overrides.txt"), "--python-version", minor]
        command += ["--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate", "--no-emit-index-url"]
        subprocess.run(command + (["--upgrade"] if upgrade else []), check=True, stdout=subprocess.DEVNULL)
        return read_pins(out, minor)


def merge(pins: dict[str, list[str]]) -> list[str]:
    """One line for each distinct pin, with a marker unless it holds for every minor version."""
    minors_of: dict[str, list[str]] = {}
    for minor, lines in pins.items():
        for pin in lines:
            minors_of.setdefault(pin, []).append(minor)
    merged = []
    for pin, minors in sorted(minors_of.items()):
        marker = " or ".join(f"python_version == '{minor}'" for minor in minors)
        merged.append(pin if len(minors) == len(pins) else f"{pin} ; {marker}")
    return merged


def main() -> int:
    """Write requirements/cpu.txt; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    arguments = parser.parse_args()
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        print("lock_cpu: uv is missing; run scripts/setup_env.sh, which installs it into .venv", file=sys.stderr)
        return 2
    target = REQUIREMENTS / "cpu.txt"
    present = {minor: read_pins(target, minor) if target.exists() else [] for minor in MINORS}
    merged = merge({minor: resolve(uv, minor, present[minor], arguments.upgrade) for minor in MINORS})
    target.write_text("\n".join([HEADER, *merged]) + "\n")
    print(f"{target.name}: {len(merged)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
