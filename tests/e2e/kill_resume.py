# SPDX-License-Identifier: Apache-2.0
"""Kill -9 of an EG-RL run with co-training, twice, and what the resumed run does. Run by hand (a quarter of an hour):

`python tests/e2e/kill_resume.py OUT_DIR`

One run goes through its 7 steps unbroken. Another is killed (all its processes at once) between steps 3 and 4, resumed
from step 2, killed again while it writes the checkpoint of step 4, and resumed once more. Prints, for each step from 3
on, how far its rewards and losses are from the unbroken run's, and exits with 1 if any is over the limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness  # a script: its own folder is on the path
import psutil

from recipes.tiny_digits.environment import CPU_ENV

STEPS, LIMIT = 7, 1e-5
EXTRA = [
    "embedrl.embedder.train.enable=True",
    "embedrl.embedder.train.lr=1e-3",
    "embedrl.embedder.train.warmup_steps=1",
    "embedrl.embedder.train.max_anchor_drop=1.0",
    "embedrl.embedder.train.anchor_pairs=8",
    "embedrl.embedder.train.ema_decay=0.5",
    "trainer.val_before_train=False",
    "trainer.save_freq=2",
]
LOSSES = ("actor/pg_loss", "actor/grad_norm", "embedder/loss", "embedder/grad_norm", "embedder/anchor_hit@1")


def kill_when(inputs: Path, folder: Path, happened: Callable[[], bool]) -> None:
    """Start the run and kill -9 every process of it as soon as something has happened."""
    environment = {**os.environ, **CPU_ENV, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    command = [sys.executable, "-m", "embedrl_verl.train", *harness.overrides(inputs, folder, steps=STEPS), *EXTRA]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "killed.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 900
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended before it could be killed; see {folder / 'killed.log'}")
        time.sleep(0.005)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait()


def main(root: Path) -> int:
    """Run everything and compare."""
    harness.prepare(root)
    unbroken = harness.run(root, root / "unbroken", EXTRA, steps=STEPS)
    if unbroken.code:
        raise SystemExit(unbroken.output[-4000:])
    folder = root / "killed"
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    kill_when(root, folder, lambda: (folder / "rollouts" / "3.jsonl").exists())
    print(f"killed after step 3; the tracker names step {tracker.read_text()}", flush=True)
    kill_when(root, folder, lambda: (folder / "checkpoints" / "global_step_4" / "actor").exists())
    print(f"killed in the checkpoint of step 4; the tracker names step {tracker.read_text()}", flush=True)
    resumed = harness.run(root, folder, EXTRA, steps=STEPS)
    if resumed.code:
        raise SystemExit(resumed.output[-4000:])
    worst = 0.0
    for step in range(3, STEPS + 1):
        rows = [
            {(row["pair_id"], row["side"], row["rollout"]): row["score"] for row in run.dump("rollouts", step)}
            for run in (unbroken, resumed)
        ]
        same = rows[0].keys() == rows[1].keys()
        rewards = max(abs(rows[0][key] - rows[1][key]) for key in rows[0]) if same else float("inf")
        losses = {name: abs(unbroken.metrics[step][name] - resumed.metrics[step][name]) for name in LOSSES}
        scale = {name: max(1.0, abs(unbroken.metrics[step][name])) for name in LOSSES}
        worst = max(worst, rewards, *(losses[name] / scale[name] for name in LOSSES))
        shown = ", ".join(f"{name} {value:.1e}" for name, value in losses.items())
        print(f"step {step}: {len(rows[0])} rewards differ by at most {rewards:.1e}; {shown}", flush=True)
    print(f"largest difference {worst:.1e} (limit {LIMIT:.0e})")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
