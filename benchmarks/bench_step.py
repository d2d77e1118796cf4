# SPDX-License-Identifier: Apache-2.0
"""Seconds a step of EG-RL against plain GRPO with a constant reward, by stage, in one sitting on one machine.

Both run verl's own trainer with the same models, prompts, batch and update settings. Plain GRPO uses trainer mode
`plain_sync` (verl's PPOTrainerSync), verl's single-turn agent loop and a per-row reward of 0, so what EG-RL adds is
all the difference: parsing, evidence and encoding beside the rollout, the Embedder, the reward maths. Runs alternate.

    python benchmarks/bench_step.py --inputs RUN_FOLDER --rounds 2 --steps 12

`RUN_FOLDER` is the output of recipes/run_egrl_tiny_cpu.sh (trained models, so that answers have their real length).
Prints medians a stage, the ratio of the step medians, and the share of the reward stage, without the first two steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_run import overrides

from embedrl_verl.progress import read_metrics
from recipes.tiny_digits.environment import CPU_ENV

STAGES = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "step")
WARM_UP = 2
PLAIN = [
    "trainer.v1.trainer_mode=plain_sync",
    "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
    "reward.num_workers=1",
    "reward.reward_manager.name=naive",
    f"reward.custom_reward_function.path={Path(__file__).resolve()}",
]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: object, **_: object) -> float:
    """The constant reward of plain GRPO (verl's per-row signature)."""
    return 0.0


def measure(module: str, arguments: list[str], folder: Path) -> dict[str, list[float]]:
    """Run once; seconds of each stage for every step after the warm-up."""
    folder.mkdir(parents=True)
    environment = {**os.environ, **CPU_ENV, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    command = [sys.executable, "-m", module, *arguments, f"trainer.default_local_dir={folder / 'checkpoints'}"]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    steps = [metrics for step, metrics in sorted(read_metrics(folder / "metrics.jsonl").items()) if step > WARM_UP]
    return {stage: [metrics.get(f"timing_s/{stage}", 0.0) for metrics in steps] for stage in STAGES}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    args = parser.parse_args()
    shared = overrides(args.inputs.resolve(), args.steps, args.pairs, args.rollouts)
    config = Path(sys.modules["embedrl_verl.progress"].__file__ or "").parent / "config"
    times: dict[str, dict[str, list[float]]] = {"plain": {}, "egrl": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            runs = {
                "plain": (
                    "verl.trainer.main_ppo",
                    [f"--config-dir={config}", "--config-name=egrl_trainer", *shared, *PLAIN],
                ),
                "egrl": ("embedrl_verl.train", shared),
            }
            for name, (module, arguments) in runs.items():
                for stage, values in measure(module, arguments, Path(scratch) / f"{name}{number}").items():
                    times[name].setdefault(stage, []).extend(values)
    median = {name: {stage: statistics.median(values) for stage, values in of.items()} for name, of in times.items()}
    rows = 2 * args.pairs * args.rollouts
    print(f"{rows} rollouts a step, {len(times['egrl']['step'])} measured steps each; medians in seconds\n")
    print("| stage | plain GRPO | EG-RL | difference |")
    print("|---|---|---|---|")
    for stage in STAGES:
        plain, egrl = median["plain"][stage], median["egrl"][stage]
        print(f"| {stage} | {plain:.3f} | {egrl:.3f} | {egrl - plain:+.3f} |")
    ratio = median["egrl"]["step"] / median["plain"]["step"]
    share = statistics.median(
        reward / step for reward, step in zip(times["egrl"]["reward"], times["egrl"]["step"], strict=True)
    )
    print(f"\nstep ratio EG-RL / plain GRPO: {ratio:.3f}")
    print(f"reward stage as a share of the EG-RL step: {share:.1%} (target: at most 10%)")


if __name__ == "__main__":
    main()
