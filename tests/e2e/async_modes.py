# SPDX-License-Identifier: Apache-2.0
"""The asynchronous modes through the real engines: what every trained batch must be, and a run by hand.

`python tests/e2e/async_modes.py OUT_DIR [--steps 20] [--trained RUN]` (about 15 minutes)

Runs `egrl_colocate_async` and `egrl_separate_async`, the first one killed (all its processes at once) half-way and
resumed, with a validation among the rollouts every five steps; `--trained` is a finished run of
recipes/run_egrl_tiny_cpu.sh, whose models and world are then used instead of untrained ones. Of every step, from its
dump: batches hold whole pairs of one source, and their rewards are those that the pure reward functions give the same
rollouts, as in synchronous training. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

from embedrl_verl.data.media import MediaLimits

if __name__ == "__main__":
    import harness  # a script: its own folder is on the path
    import kill_resume
    import rescore as rescoring
else:
    from tests.e2e import harness
    from tests.e2e import rescore as rescoring

COLOCATE = ["trainer.v1.trainer_mode=egrl_colocate_async"]
# Rollouts on a server of their own and two mini-batches of two pairs a step.
SEPARATE = [
    "trainer.v1.trainer_mode=egrl_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.hybrid_engine=False",
    "actor_rollout_ref.rollout.nnodes=1",
]
# Long rollouts, and few of them at once, so that updates interrupt some.
BUSY = ["actor_rollout_ref.rollout.max_num_seqs=4", "data.max_response_length=128"]
LIMIT = 1e-5


def batches(run: harness.Run, step: int) -> list[list[dict]]:
    """The rows of each batch that was rewarded in a step."""
    found = defaultdict(list)
    for row in run.dump("rollouts", step):
        found[row["mini_batch"]].append(row)
    return [found[number] for number in sorted(found)]


def check_whole_pairs(rows: list[dict], *, pairs: int, rollouts: int) -> None:
    """Every row of `pairs` pairs of one source is there, once."""
    assert len({row["data_source"] for row in rows}) == 1
    names = {row["pair_id"] for row in rows}
    places = [(row["pair_id"], row["side"], row["rollout"]) for row in rows]
    wanted = {(name, side, g) for name in names for side in ("query", "target") for g in range(rollouts)}
    assert len(names) == pairs and len(places) == len(set(places)) and set(places) == wanted


def largest_difference(rows: list[dict], inputs: Path) -> float:
    """Between the rewards of a dump and those of the pure functions for the same texts."""
    expected = torch.tensor([row["score"] for row in rows])
    found = rescoring.rescore(rows, inputs / "data" / "train.parquet", inputs / "embedder", batch_size=32)
    return float((found - expected).abs().max())


def report(run: harness.Run, inputs: Path, steps: int, *, pairs: int) -> float:
    """Print and check every step; the largest difference of a reward."""
    worst, interrupted = 0.0, 0.0
    for step in range(1, steps + 1):
        metrics = run.metrics[step]
        held = batches(run, step)
        for rows in held:
            check_whole_pairs(rows, pairs=pairs, rollouts=4)
            worst = max(worst, largest_difference(rows, inputs))
        age = [metrics[f"embedrl/off_policy_age/{name}"] for name in ("mean", "min", "max")]
        spans = metrics["training/off_policy/trajectory_spans/max"]
        interrupted += spans > 1
        agreement = metrics["training/rollout_actor_probs_pearson_corr"]
        print(
            f"step {step}: {len(held)} x {pairs} whole pairs; age {age[0]:.2f}, {age[1]:g} to {age[2]:g}; "
            f"rows over up to {spans:g} weights; reward {metrics['embedrl/reward/mean']:.3f}; agreement of rollout and "
            f"actor {agreement:.4f}; {metrics['timing_s/step']:.1f} s",
            flush=True,
        )
    print(f"{interrupted:g} of {steps} steps hold interrupted rollouts; rewards differ by at most {worst:.1e}")
    return worst


def trained_inputs(root: Path, trained: Path) -> list[str]:
    """Links to a finished run's models and world, and the overrides that fit them."""
    for name, source in (("reasoner", "sft"), ("embedder", "embedder"), ("data", "world")):
        if not (root / name).exists():
            (root / name).symlink_to((trained / source).resolve())
    limits = {"image_min_tokens": 4, "image_max_tokens": 768, "frame_min_tokens": 4, "frame_max_tokens": 300}
    rescoring.LIMITS = MediaLimits(28, **limits)
    sections = [
        f"{where}.{name}={value}" for where in ("data.embedrl", "embedrl.embedder") for name, value in limits.items()
    ]
    return [*sections, "actor_rollout_ref.actor.optim.lr=5e-5"]


def main(root: Path, steps: int, trained: Path | None) -> int:
    """Run both modes and check them."""
    root.mkdir(parents=True, exist_ok=True)
    extra = trained_inputs(root, trained) if trained else []
    if not trained:
        harness.prepare(root)
    half = steps // 2
    extra += [
        "trainer.val_before_train=False",
        "trainer.test_freq=5",
        "data.val_max_samples=8",
        f"trainer.save_freq={half}",
    ]
    worst = 0.0
    for name, mode, pairs in (("colocate", COLOCATE, 4), ("separate", SEPARATE, 2)):
        folder = root / name
        mode = [*mode, *BUSY, f"trainer.v1.{name}_async.num_warmup_batches=2"]
        if name == "colocate":
            kill_resume.STEPS, kill_resume.EXTRA = steps, [*mode, *extra]
            kill_resume.kill_when(root, folder, lambda at=folder: (at / "rollouts" / f"{half + 1}.jsonl").exists())
            print(f"{name}: killed after step {half + 1}", flush=True)
        try:
            run = harness.run(root, folder, [*mode, *extra], steps=steps, timeout_s=1500)
        except subprocess.TimeoutExpired as error:
            print(f"{name}: {error}; the last lines:\n{str(error.output)[-4000:]}")
            return 1
        if run.code:
            print(run.output[-6000:])
            return 1
        print(f"{name}:", flush=True)
        worst = max(worst, report(run, root, steps, pairs=pairs))
    return int(worst > LIMIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trained", type=Path)
    arguments = parser.parse_args()
    sys.exit(main(arguments.out, arguments.steps, arguments.trained))
