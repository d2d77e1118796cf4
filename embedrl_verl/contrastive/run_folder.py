# SPDX-License-Identifier: Apache-2.0
"""The folder of a stage 1 run: checkpoints with a tracker file, metrics, and what `embedrl export` tells of the model.

OUT/metrics.jsonl                                one line an update or validation: {"step", "data"}
OUT/checkpoints/global_step_N/embedder/          verl's checkpoint of the worker
OUT/checkpoints/global_step_N/training.json      data, settings and scores, for the model card
OUT/checkpoints/latest_checkpointed_iteration.txt   N of the last complete one; written last
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from embedrl_verl.data.disk import TRACKER
from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.record import RECORD_FILE


class RunFolder:
    """One run's files. Only rank 0 writes; the worker's own files are written by all ranks."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).expanduser()
        self.checkpoints = self.out / "checkpoints"
        self.metrics = self.out / "metrics.jsonl"

    def step_folder(self, step: int) -> Path:
        """Folder of the checkpoint after so many updates."""
        return self.checkpoints / f"global_step_{step}"

    def embedder(self, step: int) -> str:
        """Folder of the worker's part."""
        return str(self.step_folder(step) / "embedder")

    def last_step(self) -> int:
        """Updates of the last complete checkpoint; 0 without one.

        Raises:
            ConfigError: the tracker names a checkpoint that is not there.
        """
        tracker = self.checkpoints / TRACKER
        if not tracker.is_file():
            return 0
        step = int(tracker.read_text())
        if not Path(self.embedder(step)).is_dir():
            raise ConfigError(f"{tracker} names step {step}, but {self.step_folder(step)} is not there; restore it")
        return step

    def read_training(self, step: int) -> dict[str, Any]:
        """What `write_training` wrote at a step."""
        values: dict[str, Any] = json.loads((self.step_folder(step) / RECORD_FILE).read_text())
        return values

    def write_training(self, step: int, training: dict[str, Any]) -> None:
        """Write `training.json` of a step."""
        self.step_folder(step).mkdir(parents=True, exist_ok=True)
        write_atomically(self.step_folder(step) / RECORD_FILE, json.dumps(training, indent=1) + "\n")

    def complete(self, step: int, keep: int) -> None:
        """Name the checkpoint as complete, then drop all but the last `keep`."""
        write_atomically(self.checkpoints / TRACKER, str(step))
        found = sorted(int(path.name.removeprefix("global_step_")) for path in self.checkpoints.glob("global_step_*"))
        for old in [number for number in found if number < step][: -(keep - 1) or None]:
            shutil.rmtree(self.step_folder(old))

    def forget_after(self, step: int) -> None:
        """Drop metrics of updates after `step`: they will be made again."""
        if not self.metrics.is_file():
            return
        # A run that was killed may have left half a line at the end.
        whole = [line for line in self.metrics.read_text().splitlines() if line.endswith("}}")]
        lines = [line for line in whole if json.loads(line)["step"] <= step]
        write_atomically(self.metrics, "".join(line + "\n" for line in lines))

    def log(self, step: int, data: dict[str, float]) -> None:
        """Append one line of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "data": data}) + "\n")
