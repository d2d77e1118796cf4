# SPDX-License-Identifier: Apache-2.0
"""Seconds from the start of the recipe's RL stage to RL step 1, and CPU seconds of each process until then.

    python benchmarks/bench_startup.py --rounds 1                                      # within the main job
    UNTIL=pretrain bash recipes/run_egrl_tiny_cpu.sh                                   # models and world, once
    python benchmarks/bench_startup.py --inputs runs/tiny_cpu/seed0 --rounds 2         # the RL stage alone

Without `--inputs` the recipe makes models and data first, and the time counts from the first line of the stage,
"[recipe] rl"; with it the start of the fork server is within the time. `recipes/run_egrl_tiny_cpu.sh` runs for two
steps in a folder of its own, in turns with the fork server and without it (every process imports for itself), and the
times, their ratio and a table of the processes are printed. Step 1 begins when its metrics are written, less
`timing_s/step`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from embedrl_verl.platforms.forkserver import PYTHON
from embedrl_verl.progress import read_metrics

RECIPE = Path(__file__).parents[1] / "recipes" / "run_egrl_tiny_cpu.sh"
DONE = ("sft", "embedder", "world", ".stages/world", ".stages/pretrain")
LOOK_S, SHOWN_S = 0.2, 0.5


def name_of(process: psutil.Process) -> str:
    """A short name: Ray's title, a module, or a script."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith(("ray::", "VLLM::")):
        return words[0].split(".")[0]
    after_m = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    scripts = [Path(word).name for word in words[1:] if word.endswith((".py", ".sh"))]
    return (after_m or scripts or [Path(words[0]).name])[0]


def measure(
    inputs: Path | None, folder: Path, *, forked: bool
) -> tuple[float, float, dict[str, tuple[float, float, float]]]:
    """(seconds to the start of step 1, seconds in all, (first seen, CPU user, CPU system) of each process by then)."""
    (folder / ".stages").mkdir(parents=True)
    for name in DONE if inputs else ():
        (folder / name).symlink_to((inputs / name).resolve())
    environment = {**os.environ, "OUT": str(folder), "STEPS": "2", "UNTIL": "rl", "PYTHON": sys.executable}
    environment |= {} if forked else {PYTHON: ""}
    start = time.time()
    seen: dict[int, tuple[str, float, float, float]] = {}
    log_file = folder / "log.txt"
    with log_file.open("w") as log:
        recipe = subprocess.Popen(["bash", str(RECIPE)], env=environment, stdout=log, stderr=subprocess.STDOUT)
    snapshot = stage = None
    metrics = folder / "metrics.jsonl"
    while recipe.poll() is None:
        for process in psutil.Process(recipe.pid).children(recursive=True):
            try:
                times, first = process.cpu_times(), seen.get(process.pid, ("", time.time() - start))[1]
                seen[process.pid] = (name_of(process), first, times.user, times.system)
            except psutil.Error:  # it has just ended
                continue
        if stage is None and "\n[recipe] rl\n" in f"\n{log_file.read_text()}":
            stage = time.time() if inputs is None else start
        if snapshot is None and metrics.exists() and 1 in read_metrics(metrics):
            snapshot = dict(seen)
            logged = metrics.stat().st_mtime
            begun = logged - (stage or start) - read_metrics(metrics)[1]["timing_s/step"]
        time.sleep(LOOK_S)
    if recipe.returncode or snapshot is None:
        raise SystemExit(f"the recipe must end with 0; got {recipe.returncode}:\n{log_file.read_text()}")
    return begun, time.time() - start, {f"{name} ({pid})": rest for pid, (name, *rest) in snapshot.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    begun: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for forked in (True, False):
                out = Path(folder) / f"{number}{forked}"
                seconds, total, processes = measure(arguments.inputs, out, forked=forked)
                begun[forked].append(seconds)
                shutil.rmtree(out)
                kind = "forked" if forked else "new interpreters"
                cpu = sum(user + system for _, user, system in processes.values())
                print(f"\n{kind}: step 1 after {seconds:.1f} s, two steps in {total:.1f} s, {cpu:.0f} CPU s by then")
                if number == 0:
                    print("| process | first seen, s | user, s | system, s |\n|---|---|---|---|")
                    for name, (first, user, system) in sorted(processes.items(), key=lambda one: -sum(one[1][1:])):
                        if user + system >= SHOWN_S:
                            print(f"| {name} | {first:.1f} | {user:.1f} | {system:.1f} |")
    medians = {forked: statistics.median(values) for forked, values in begun.items()}
    print(f"\nmedians to step 1: forked {medians[True]:.1f} s, new interpreters {medians[False]:.1f} s", end="")
    print(f", ratio {medians[True] / medians[False]:.2f}")


if __name__ == "__main__":
    main()
