# SPDX-License-Identifier: Apache-2.0
"""The folder of a stage 1 run.

OUT/metrics.jsonl                                   one line an update or validation: {"step", "data"}
OUT/checkpoints/global_step_N/embedder/             verl's checkpoint of the worker
OUT/checkpoints/global_step_N/training.json         data, settings and scores, for resuming and for the model card
OUT/checkpoints/latest_checkpointed_iteration.txt   N of the last complete one; written last
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.checkpoint import TRACKER, complete_steps, last_complete_step, remove_half_written


class RunFolder:
    """One run's files. Only rank 0 writes; the worker's own files are written by all ranks."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).expanduser()
        self.checkpoints = self.out / "checkpoints"
        self.metrics = self.out / "metrics.jsonl"

    def step_folder(self, step: int) -> Path:
        """Folder of the checkpoint after so many updates."""
        return self.checkpoints / f"global_step_{step}"

    def last_step(self) -> int:
        """Updates of the last complete checkpoint; 0 without one."""
        step = last_complete_step(self.checkpoints)
        if step is None:
            return 0
        if not (self.step_folder(step) / "embedder").is_dir():
            raise ConfigError(
                f"{self.checkpoints / TRACKER} names step {step}, but {self.step_folder(step)} is not there; restore it"
            )
        return step

    def complete(self, step: int, keep: int) -> None:
        """Name the checkpoint as complete, then drop all but the last `keep`."""
        write_atomically(self.checkpoints / TRACKER, str(step))
        for old in list(complete_steps(self.checkpoints).values())[:-keep]:
            shutil.rmtree(old)

    def forget_after(self, step: int) -> None:
        """Drop metrics of updates after `step`, which will be made again, and what a killed run left half-written."""
        remove_half_written(self.checkpoints)
        if not self.metrics.is_file():
            return
        whole = [line for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_atomically(self.metrics, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def log(self, step: int, data: dict[str, float]) -> None:
        """Append one line of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "data": data}) + "\n")
