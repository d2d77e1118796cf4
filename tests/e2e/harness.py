# SPDX-License-Identifier: Apache-2.0
"""One tiny EG-RL run through the real engines: models and data made on the spot, started as a user starts it.

`python tests/e2e/harness.py OUT_DIR [hydra overrides]` does the same from a shell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedrl_verl.platforms.forkserver import PYTHON, python
from embedrl_verl.progress import read_metrics
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import write_world

ENTRY = ("-m", "embedrl_verl.train")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what it printed (stderr included)."""

    folder: Path
    output: str
    code: int

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def dump(self, kind: str, step: int) -> list[dict]:
        """Rows of `rollouts` or `validation` at a step."""
        lines = (self.folder / kind / f"{step}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def prepare(folder: Path, *, pairs: int = 8) -> None:
    """Reasoner, Embedder and pair records of the digits world (untrained models; enough to see every stage work)."""
    if not (folder / "data" / "train.parquet").exists():
        build_tiny_model(folder / "reasoner", seed=0)
        build_tiny_model(folder / "embedder", seed=1)
        write_world(folder / "data", sft=4, train=pairs, heldout=4)


def overrides(inputs: Path, folder: Path, *, steps: int, ranks: int = 1) -> list[str]:
    """A run of `steps` steps with 4 pairs x 2 sides x 4 rollouts on `ranks` data-parallel CPU ranks."""
    return [
        "platform=cpu",
        f"data.train_files={inputs / 'data' / 'train.parquet'}",
        f"data.val_files={inputs / 'data' / 'heldout.parquet'}",
        "data.train_batch_size=8",
        "data.val_batch_size=12",
        "data.max_prompt_length=256",
        "data.max_response_length=48",
        "data.seed=1",
        "data.embedrl.prompt_style=compact",
        "data.embedrl.image_min_tokens=1",
        "data.embedrl.image_max_tokens=16",
        "data.embedrl.frame_min_tokens=1",
        "data.embedrl.frame_max_tokens=16",
        f"actor_rollout_ref.model.path={inputs / 'reasoner'}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.max_model_len=512",
        f"embedrl.embedder.path={inputs / 'embedder'}",
        "embedrl.embedder.image_min_tokens=1",
        "embedrl.embedder.image_max_tokens=16",
        "embedrl.embedder.frame_min_tokens=1",
        "embedrl.embedder.frame_max_tokens=16",
        f"trainer.n_gpus_per_node={ranks}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=100",
        "trainer.logger=[file]",
        "trainer.val_before_train=True",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
        f"trainer.validation_data_dir={folder / 'validation'}",
    ]


def run(
    inputs: Path,
    folder: Path,
    extra: list[str] | None = None,
    *,
    steps: int = 2,
    ranks: int = 1,
    timeout_s: float = 900,
    entry: Sequence[str] = ENTRY,
    shared: bool = True,
) -> Run:
    """Run `python ENTRY OVERRIDES` to the end and return what happened; never raises on a failing run.

    shared: fork the run itself and its processes from the server of all tests; else it is started as a person does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **CPU_ENV, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    if not shared:
        environment.pop(PYTHON, None)
    process = subprocess.run(
        [
            python() if shared else sys.executable,
            *entry,
            *overrides(inputs, folder, steps=steps, ranks=ranks),
            *(extra or []),
        ],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
    )
    (folder / "log.txt").write_text(process.stdout)
    return Run(folder, process.stdout, process.returncode)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    prepare(root)
    result = run(root, root / "run", sys.argv[2:])
    print(result.output[-8000:])
    raise SystemExit(result.code)
