# SPDX-License-Identifier: Apache-2.0
"""The long synchronous run: what it trains on, with which settings, and what happens in which step.

Step 1: plain. Steps 2 to 4: the judge is killed, hangs, answers garbage (judge_faults.py). Steps 3 and 6: the Embedder
is trained. Step 6: a checkpoint and a validation. Eight steps are one epoch: four batches of digits, and one of each
converted source.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_preprocess.colpali_train import ColPaliTrain
from data_preprocess.llava_hound import LlavaHound
from data_preprocess.mmeb_train import MmebTrain
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.command import convert_main
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs
from tests.convert.make_fixtures import write_all
from tests.e2e import harness
from tests.e2e.judge_faults import LIMIT, FaultyJudge

STEPS, TRAINED_EVERY, SAVED = 8, 3, 6
DIGITS = ("digits_i2t", "digits_video")  # 8 pairs of each: two batches
# source: converter, fixture, options; media paths of all are relative to the folder of the fixtures
CONVERSIONS = {
    "mmeb_okvqa": (MmebTrain, "mmeb", ["--sets", "OK-VQA", "--images-dir", "mmeb"]),
    "llavahound_video_retrieval": (
        LlavaHound,
        "llava_hound",
        ["--modes", "video_retrieval", "--frames-dir", "llava_hound/train_300k"],
    ),
    "vidore_colpali": (ColPaliTrain, "colpali", []),
    "visrag": (VisRagTrain, "visrag", []),
}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """The finished run, its pair files and their media root, and its settings."""

    run: harness.Run
    files: list[Path]
    media_root: Path
    extra: list[str]


def pairs(inputs: Path, folder: Path) -> tuple[list[Path], Path]:
    """Files of digits and of every converted source, 4 pairs of each of these; their media root."""
    digits = [pair for pair in read_pairs(inputs / "data" / "train.parquet") if pair.data_source in DIGITS]
    write_pairs(digits, folder / "digits.parquet")
    files, root = [folder / "digits.parquet"], folder / "fixtures"
    roots = write_all(root, pairs=4)
    for source, (converter, fixture, options) in CONVERSIONS.items():
        argv = ["--input", str(roots[fixture]), "--out", str(folder / source), "--media-root", str(root), *options]
        assert convert_main(converter, source, argv) == 0
        files += map(Path, pair_files([folder / source]))
    return files, root


def settings(files: list[Path], root: Path, judge: str) -> list[str]:
    """The paper's reward, and a co-trained Embedder on a device of its own whose average gives the rewards."""
    train = {"enable": True, "lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5, "max_anchor_drop": 1.0}
    train |= {"anchor_pairs": 8, "every": TRAINED_EVERY}
    limits = {"limit": LIMIT, "timeout_s": 4, "retries": 1, "backoff_s": 0.1, "deadline_s": 20, "max_unknown_share": 1}
    return [
        f"data.train_files=[{','.join(map(str, files))}]",
        f"data.media_root={root}",
        *(f"embedrl.embedder.train.{name}={value}" for name, value in train.items()),
        "embedrl.embedder.n_gpus_per_node=1",
        "ray_kwargs.ray_init.num_gpus=2",
        "reward.custom_reward_function.path=reward/paper.py",
        *(f"embedrl.judge.{name}={value}" for name, value in limits.items()),
        f"embedrl.judge.urls=[{judge}]",
        f"trainer.save_freq={SAVED}",
        f"trainer.test_freq={SAVED}",
    ]


def play(inputs: Path, folder: Path) -> Scenario:
    """Run it; every fault of the judge has happened."""
    files, root = pairs(inputs, folder)
    judge = FaultyJudge(folder / "judge", folder / "metrics.jsonl")
    extra = settings(files, root, judge.url)
    try:
        run = harness.run(inputs, folder, extra, steps=STEPS)
    finally:
        judge.close()
    assert run.code == 0, run.output[-6000:]
    assert judge.happened == ["killed", "stopped", "garbage", "well"]
    return Scenario(run, files, root, extra)


def resume(inputs: Path, scenario: Scenario) -> harness.Run:
    """The last steps again, from the checkpoint, with a judge that is well."""
    folder = scenario.run.folder
    step = folder / "checkpoints" / f"global_step_{SAVED}"
    judge = FaultyJudge(folder / "judge", folder / "metrics.jsonl", faults=False)
    extra = [*scenario.extra, f"embedrl.judge.urls=[{judge.url}]", "trainer.val_before_train=False"]
    extra += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={step}"]
    try:
        return harness.run(inputs, folder, extra, steps=STEPS, shared=False)
    finally:
        judge.close()
